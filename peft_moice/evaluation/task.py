"""What a task is: it draws questions whose answers stand at chosen positions of a long prompt."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)

Scoring = Literal["exact", "any", "all", "choice"]


@dataclass(frozen=True)
class Example:
    """A question about a long prompt.

    Attributes:
        prompt: the user's message.
        answers: the right answers. The loss is that of the first.
        position: where the answer stands, 0 (start of the prompt's material) to 1 (its end); None where that is not
            known.
        length: how much material the prompt shows, in the task's unit.
        opening: words with which the assistant's message begins, before the answer.
        choices: with the scoring "choice", what there is to choose from.
    """

    prompt: str
    answers: tuple[str, ...]
    position: float | None
    length: int
    opening: str = ""
    choices: tuple[str, ...] = ()


class Task(Protocol):
    """Draws examples. A new task is a class with these four members.

    Attributes:
        name: of the task.
        unit: what `length` counts, such as "facts" or "tokens".
        scoring: how an answer is scored. "exact": 1 if each token of the first answer is the model's first choice
            after those before it, which is when greedy decoding would write it. "any": 1 if the first line that the
            model writes contains one of the answers, without regard to case, punctuation and articles. "all": the
            share of the answers that what it writes contains, without regard to case; the loss is that of all of
            them, joined by commas. "choice": 1 if the first answer is the likeliest of the choices, by its mean loss.
    """

    name: str
    unit: str
    scoring: Scoring

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """Examples about the same material, one for each position. What their prompts begin with alike is read once.

        Args:
            rng: source of randomness.
            length: how much material to show, in `unit`.
            positions: relative positions of what is asked for, each in [0, 1].

        Raises:
            ValueError: there is too little material for `length`.
        """
        ...


def place(position: float, length: int) -> int:
    """Index of the item at a relative position among `length` items."""
    return round(position * (length - 1))
