"""Families of cases of which `make quick` runs a few."""

from collections.abc import Collection, Iterable

import pytest


def slow_but(few: Collection[object], values: Iterable[object]) -> list[object]:
    """The values of a parameter (tuples: of several), all of them marked slow but `few`."""
    return [value if value in few else _slow(value) for value in values]


def _slow(value: object) -> object:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
