"""Files of benchmarks in their original format, JSON lines, and draws from them without repetition."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from ..training.data.sources import Source, read_records

T = TypeVar("T")


def read_json_lines(file: str | Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file `*.jsonl` or `*.jsonl.gz`, each of which has to have the fields `needed`.

    Raises:
        ValueError: the file is missing or damaged, a line is not an object with these fields, or the file is empty.
    """
    records = []
    for where, record in read_records(Source(str(file), "file")):
        missing = [name for name in needed if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r}; an object with {needed} is needed.")
        records.append(record)
    return records


class Deck(Generic[T]):
    """Items in random order, all of them before any comes again.

    Every source of randomness has its own order and its own place in it, so equally seeded ones are dealt the same.
    """

    def __init__(self, items: Sequence[T]):
        self.items = items
        self._left: WeakKeyDictionary[random.Random, list[T]] = WeakKeyDictionary()

    def deal(self, rng: random.Random) -> T:
        """The next item."""
        left = self._left.setdefault(rng, [])
        if not left:
            left += rng.sample(self.items, len(self.items))
        return left.pop()
