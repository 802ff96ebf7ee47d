"""Families of cases of which `make quick` runs a few."""

from collections.abc import Collection, Iterable

import pytest


def slow_but(few: Collection[object], values: Iterable[object]) -> list[object]:
    """The values of a parameter, all of them marked slow but `few`."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.slow) for value in values]
