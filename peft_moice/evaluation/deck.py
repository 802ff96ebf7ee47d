"""Draws from a file without drawing anything twice before all of it was drawn."""

import random
from collections.abc import Sequence
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Deck(Generic[T]):
    """Items in random order, all of them before any comes again.

    Every source of randomness has its own order and its own place in it, so equally seeded ones are dealt the same.

    Args:
        items: what is dealt, at least one.
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
