"""Whether a task can be asked at all, found out without a model."""

import random
from collections.abc import Sequence
from typing import Any

from .encoding import encode_example
from .task import Task


def try_task(task: Task, tokenizer: Any, lengths: Sequence[int], positions: Sequence[float], num_groups: int) -> None:
    """Draw one example at the shortest and one at the longest length, and encode it.

    Args:
        task: what is to be asked.
        tokenizer: the model's tokenizer.
        lengths: as [`evaluate`] takes them.
        positions: likewise.
        num_groups: likewise.

    Raises:
        ValueError: a value out of its range; the task has too little material, or none of an answer has tokens.
    """
    check_grid(lengths, positions, num_groups)
    for length in {min(lengths), max(lengths)}:
        for example in task.draw(random.Random(0), length, positions)[:1]:
            encode_example(tokenizer, example, example.answers[0])


def check_grid(lengths: Sequence[int], positions: Sequence[float], num_groups: int) -> None:
    """Raise a ValueError for what [`evaluate`] cannot run over."""
    if num_groups < 1:
        raise ValueError(f"`num_groups` is {num_groups}, but has to be at least 1.")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"`lengths` has to hold positive numbers, not {list(lengths)}.")
    for name, values in (("lengths", lengths), ("positions", positions)):
        if len(set(values)) < len(values):
            raise ValueError(
                f"`{name}` names a value twice: {list(values)}. Its questions would count twice; drop one."
            )
    if not positions or not all(0 <= position <= 1 for position in positions):
        raise ValueError(f"`positions` has to hold numbers in 0..1, not {positions!r}.")
