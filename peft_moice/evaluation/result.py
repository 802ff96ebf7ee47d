"""What a model scored on a task, and its uncertainty."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .intervals import bootstrap_interval, wilson_interval
from .plotting import plot_heat_map, plot_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Score:
    """One question.

    Attributes:
        group: number of the draw, from 0; questions of a draw share their material.
        length: how much material was shown.
        position: relative position of what was asked for, or None.
        score: 0 to 1.
        loss: of the first answer, mean over its tokens in nats.
        tokens: share of the tokens of the first answer that are the model's first choice after those before them.
    """

    group: int
    length: int
    position: float | None
    score: float
    loss: float
    tokens: float


@dataclass(frozen=True)
class Result:
    """Scores of a model on a task.

    Attributes:
        task: name of the task.
        unit: what lengths count.
        model: name of the model.
        seed: of the draws.
        scores: of every question.
    """

    task: str
    unit: str
    model: str
    seed: int
    scores: tuple[Score, ...]

    @property
    def lengths(self) -> list[int]:
        """The lengths that were asked at, ascending."""
        return sorted({score.length for score in self.scores})

    @property
    def positions(self) -> list[float]:
        """The positions that were asked at, ascending; empty if they are not known."""
        return sorted({score.position for score in self.scores if score.position is not None})

    @property
    def _columns(self) -> list[float | None]:
        """The positions, or None (all questions) where they are not known."""
        return [*self.positions] or [None]

    def select(self, length: int | None = None, position: float | None = None) -> list[Score]:
        """The questions at a length and a position; None stands for all.

        Raises:
            ValueError: there is none.
        """
        chosen = [
            score
            for score in self.scores
            if (length is None or score.length == length) and (position is None or score.position == position)
        ]
        if not chosen:
            raise ValueError(
                f"No question was asked at length {length} and position {position}; there are the lengths "
                f"{self.lengths} and the positions {self.positions}."
            )
        return chosen

    def mean(self, field: str = "score", length: int | None = None, position: float | None = None) -> float:
        """Mean "score", "loss" or "tokens" of the questions that [`select`] gives."""
        return fmean(getattr(score, field) for score in self.select(length, position))

    def gap(self, length: int | None = None) -> float:
        """Mean score at the best position minus that at the worst, 0 to 1; 0 where positions are not known."""
        scores = [self.mean("score", length, position) for position in self._columns]
        return max(scores) - min(scores)

    def interval(
        self,
        field: str = "score",
        length: int | None = None,
        position: float | None = None,
        confidence: float = 0.95,
    ) -> tuple[float, float]:
        """Interval that covers the true value of that mean with probability `confidence`, in (0, 1).

        Wilson's for scores of 0 and 1 of which every draw gave one; else a bootstrap over draws, whose questions
        share their material and so are not independent. The questions of a single draw have to pass for independent.
        Where all draws have the same mean score, the bootstrap would have no width: it is Wilson's again, and every
        draw counts once.
        """
        chosen = self.select(length, position)
        values = [getattr(score, field) for score in chosen]
        draws = _by_draw(chosen, values)
        groups = draws if len(draws) > 1 else [[value] for value in values]
        means = [fmean(group) for group in groups]
        independent = len(groups) == len(values) and set(values) <= {0.0, 1.0}
        if field == "score" and (independent or len(set(means)) == 1):
            return wilson_interval(fmean(means) * len(means), len(means), confidence)
        return bootstrap_interval(groups, confidence)

    def difference(self, before: "Result", confidence: float = 0.95) -> tuple[float, tuple[float, float]]:
        """How much higher the mean score is than that of `before`, another model's on the same questions, and an
        interval that covers the true value with probability `confidence`, in (0, 1).

        A bootstrap over draws of the differences. Where all draws have the same, it would have no width, and the
        interval is Newcombe's (Statistics in Medicine 1998) from those of both means, which knows of no pairs.

        Raises:
            ValueError: other questions.
        """
        questions, asked = ([(s.length, s.group, s.position) for s in result.scores] for result in (self, before))
        if self.task != before.task or self.seed != before.seed or questions != asked or not asked:
            raise ValueError(
                f"{self.model} and {before.model} were not asked the same questions. Call `evaluate` alike for both."
            )
        changes = [after.score - other.score for after, other in zip(self.scores, before.scores, strict=True)]
        draws = _by_draw(self.scores, changes)
        mean = self.mean() - before.mean()
        if len({*map(fmean, draws)}) > 1:
            return mean, bootstrap_interval(draws, confidence)
        (low, high), (low_before, high_before) = (result.interval(confidence=confidence) for result in (self, before))
        below = hypot(self.mean() - low, high_before - before.mean())
        above = hypot(high - self.mean(), before.mean() - low_before)
        return mean, (mean - below, mean + above)

    def table(self, field: str = "score") -> list[list[float]]:
        """Means by length (rows) and position (columns)."""
        return [[self.mean(field, length, position) for position in self._columns] for length in self.lengths]

    def plot(self, others: Sequence["Result"] = ()) -> "Figure":
        """Draw this result: by position, beside `others` of the same task; or alone over position and length.

        A single result of several lengths and positions is drawn as a heat map, everything else as curves.

        Raises:
            ValueError: two results have the same name of a model, or one of `others` lacks a length or position.
        """
        if not others and len(self.lengths) > 1 and len(self.positions) > 1:
            title = f"{self.task}, {self.model}"
            return plot_heat_map(self.table(), self.lengths, self.positions, unit=self.unit, title=title)
        names = [result.model for result in (self, *others)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"The curves are named {names}, and those of equal names would hide each other. Give `evaluate` a "
                "`name` for each model, or rename results with `dataclasses.replace(result, model=...)`."
            )
        panels = {
            f"{self.task}, {length:,} {self.unit}": {
                result.model: (
                    [result.mean(length=length, position=position) for position in self.positions],
                    [result.interval(length=length, position=position) for position in self.positions],
                )
                for result in (self, *others)
            }
            for length in self.lengths
        }
        return plot_positions(panels, self.positions)

    def to_dict(self) -> dict[str, Any]:
        """Means, 95% intervals and all scores, ready for JSON."""
        cells = [
            {
                "length": length,
                "position": position,
                "questions": len(self.select(length, position)),
                "score": self.mean("score", length, position),
                "interval": self.interval("score", length, position),
                "loss": self.mean("loss", length, position),
                "tokens": self.mean("tokens", length, position),
            }
            for length in self.lengths
            for position in self._columns
        ]
        return {**asdict(self), "cells": cells}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Result":
        """The result that [`to_dict`] was called on."""
        scores = tuple(Score(**score) for score in values["scores"])
        return cls(values["task"], values["unit"], values["model"], values["seed"], scores)

    def save(self, file: str | Path) -> None:
        """Write [`to_dict`] as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> "Result":
        """Read what [`save`] wrote."""
        return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))


def _by_draw(scores: Sequence[Score], values: Sequence[float]) -> list[list[float]]:
    """`values` of questions, those of a draw together."""
    draws: dict[tuple[int, int], list[float]] = {}
    for score, value in zip(scores, values, strict=True):
        draws.setdefault((score.length, score.group), []).append(value)
    return list(draws.values())
