"""Accuracy by position of the asked fact: the U curve of "Lost in the Middle" (Liu et al., TACL 2024)."""

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..probing.evaluation_mode import evaluating
from .facts import EncodedChat, encode_chat, sample_facts
from .intervals import wilson_interval
from .reader import Reader
from .task import POSITIONS, place


@dataclass(frozen=True)
class PositionSweep:
    """Right answers by position.

    Attributes:
        num_facts: number of facts in each prompt.
        positions: relative positions of the asked fact, 0 first to 1 last.
        correct: number of right answers at each position.
        trials: number of questions at each position.
    """

    num_facts: int
    positions: tuple[float, ...]
    correct: tuple[int, ...]
    trials: int

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share of right answers at each position, 0 to 1."""
        return tuple(count / self.trials for count in self.correct)

    @property
    def gap(self) -> float:
        """Accuracy at the best position minus accuracy at the worst."""
        return max(self.accuracy) - min(self.accuracy)

    def intervals(self, confidence: float = 0.95) -> list[tuple[float, float]]:
        """Wilson interval of the accuracy at each position; `confidence` lies in (0, 1)."""
        return [wilson_interval(count, self.trials, confidence) for count in self.correct]

    def to_dict(self) -> dict[str, Any]:
        """Counts, accuracies and 95% intervals, ready for JSON."""
        return {**asdict(self), "accuracy": self.accuracy, "intervals": self.intervals(), "gap": self.gap}


def position_sweep(
    model: nn.Module,
    tokenizer: Any,
    *,
    num_facts: int = 30,
    num_lists: int = 32,
    positions: tuple[float, ...] = POSITIONS,
    seed: int = 0,
) -> PositionSweep:
    """Ask `model` for the facts at `positions` of `num_lists` random lists and count exactly right answers.

    An answer is right if each of its code's tokens is the model's first choice after those before it, which is when
    greedy decoding would give the code. The facts of a list are read once and kept in the cache for all its questions.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
        num_facts: number of facts in a list. Default: 30.
        num_lists: number of lists, which is the number of questions at each position. Default: 32.
        positions: relative positions of the asked fact, each in [0, 1]. Default: 0, 1/4, 1/2, 3/4, 1.
        seed: seed of the lists. Equal seeds ask different models the same questions. Default: 0.

    Raises:
        ValueError: a value out of its range.
    """
    if num_lists < 1:
        raise ValueError(f"`num_lists` is {num_lists}, but has to be at least 1.")
    if not positions or not all(0 <= position <= 1 for position in positions):
        raise ValueError(f"`positions` has to hold numbers in 0..1, not {positions!r}.")
    rng = random.Random(seed)
    asked = [place(position, num_facts) for position in positions]
    correct = [0] * len(positions)
    with evaluating(model):
        for _ in tqdm(range(num_lists), desc=f"{num_facts} facts", unit="list"):
            facts = sample_facts(num_facts, rng)
            reader = Reader(model)
            for column, index in enumerate(asked):
                correct[column] += _is_right(reader, encode_chat(tokenizer, facts, [index]))
    return PositionSweep(num_facts, tuple(positions), tuple(correct), num_lists)


def _is_right(reader: Reader, chat: EncodedChat) -> bool:
    """Whether greedy decoding gives the answers of a chat."""
    is_answer = torch.tensor(chat.is_answer)
    first = int(is_answer.nonzero()[0])
    predicted = reader.logits(chat.input_ids, first)[:-1].argmax(dim=-1).cpu()
    return bool((predicted == torch.tensor(chat.input_ids[first:]))[is_answer[first:]].all())
