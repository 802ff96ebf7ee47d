"""Ropes by the position of the query and by the distance of the key: rules as configs hold them, and their experts.

A rule is a dict in the form of transformers' `rope_parameters`, over the model's own, with two ranges more:

    {"rope_type": "linear", "factor": 13.0, "query_positions": [8192, None], "distances": [6144, None]}
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from .rotation import NEVER

Parameters = tuple[tuple[str, Any], ...]
"""Rope parameters over the model's own, sorted by name, with tuples for lists; none for the model's own rope."""
Base = float | dict[str, Any]
"""An expert of routers as configs hold it: a base angle, or rope parameters over the model's own."""
Ropes = tuple[float | Parameters, ...]
"""The experts of routers as tables of rotations name them."""

_RANGES = ("query_positions", "distances")
_TYPES = ("default", "linear", "yarn", "llama3", "longrope", "proportional")
_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
)
_NAMES = {"rope_type", "truncate", "short_factor", "long_factor", *_NUMBERS, *_RANGES}
_TWO = (
    "Make two adapters and activate both: one of ropes without ranges, among which routers choose, and one of rules "
    "with ranges, which routers fill where they give the model's own rope."
)


@dataclass(frozen=True)
class RopeExpert:
    """The rope of the queries at some positions, near and far.

    Attributes:
        near: rope parameters for keys nearer than `start`.
        far: those for keys from there on, or None where `near` holds for all.
        start: the distance from which keys are far; `NEVER` without `far`.
        first: the first query position.
        end: the position behind the last, or None.
    """

    near: Parameters = ()
    far: Parameters | None = None
    start: int = NEVER
    first: int = 0
    end: int | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is the model's own rope at every distance."""
        return not self.near and not self.far

    def in_words(self) -> str:
        """What applies where, for people."""
        where = f"queries from {self.first:,} on" if self.first else "queries"
        where += f" below {self.end:,}" if self.end is not None else ""
        near = _parameters_in_words(self.near)
        if self.far is None:
            return f"{where}: {near}"
        return f"{where}: {near} for keys nearer than {self.start:,}, {_parameters_in_words(self.far)} beyond"


def _parameters_in_words(parameters: Parameters) -> str:
    if not parameters:
        return "the model's own rope"
    values = dict(parameters)
    rope_type = values.pop("rope_type", "the model's own type")
    return " ".join([str(rope_type), *(f"{name} {value}" for name, value in values.items())])


def experts_of(rules: object) -> tuple[RopeExpert, ...]:
    """The experts that rules stand for, by their query positions, after checks.

    Args:
        rules: a list of dicts. The ranges of query positions follow each other from 0 on; those of one have distances
            from 0 on, in one rule or in two.

    Raises:
        ValueError: unknown names or rope types, values out of range, gaps or overlaps between ranges.
        TypeError: no list of dicts, or values of the wrong type.
    """
    groups: dict[tuple[int, int | None], list[tuple[int, int | None, Parameters]]] = {}
    for index, rule in enumerate(_checked_rules(rules)):
        where = f"ropes[{index}]"
        queries, distances = (_range_of(rule, name, where) for name in _RANGES)
        groups.setdefault(queries, []).append((*distances, _parameters_of(rule, where)))
    ordered = sorted(groups, key=lambda queries: queries[0])
    for (_, end), (first, _) in zip([(0, 0), *ordered], ordered, strict=False):
        if end != first:
            raise ValueError(
                f"The `query_positions` of `ropes` are {[list(queries) for queries in ordered]}, which leave "
                f"{'a gap' if end is not None and first > end else 'an overlap'} at {first}. Let each range begin "
                "where the one before ends, the first at 0; where several ropes shall apply, give them the same."
            )
    return tuple(_expert(queries, groups[queries]) for queries in ordered)


def _checked_rules(rules: object) -> Sequence[dict[str, Any]]:
    if not isinstance(rules, (list, tuple)) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise TypeError(f"`ropes` has to be a list of dicts of rope parameters, not {shortened(rules)}.")
    return rules


def are_for_routers(rules: object) -> bool:
    """Whether there are several rules, all of which hold everywhere, so that routers have to choose.

    Raises:
        ValueError: ranges out of range.
        TypeError: no list of dicts, or ranges of the wrong type.
    """
    checked = _checked_rules(rules)
    return len(checked) > 1 and all(_holds_everywhere(rule, f"ropes[{i}]") for i, rule in enumerate(checked))


def _holds_everywhere(rule: dict[str, Any], where: str) -> bool:
    return all(_range_of(rule, name, where) == (0, None) for name in _RANGES)


def checked_rope(rope: dict[str, Any], where: str) -> Base:
    """An expert of routers in JSON's types, after checks; a base angle where the rope has nothing else.

    Raises:
        ValueError: unknown names or rope types, values out of range, or a rope that does not hold everywhere.
        TypeError: values of the wrong type.
    """
    if not _holds_everywhere(rope, where):
        raise ValueError(
            f"`{where}` is {shortened(rope)}, but routers choose among ropes that hold everywhere. {_TWO}"
        )
    checked = in_json(_parameters_of(rope, where))
    if checked.get("short_factor") != checked.get("long_factor"):
        raise ValueError(
            f"`{where}` has a `short_factor` and another `long_factor`, but what routers choose is one rope at any "
            "length. Give the same list as both."
        )
    return float(checked["rope_theta"]) if checked.keys() == {"rope_theta"} else checked


def expert_of(base: Base) -> float | Parameters:
    """The member of [`Ropes`] that stands for `base`."""
    if not isinstance(base, dict):
        return base
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in base.items()))


def expert_in_words(expert: float | Parameters) -> str:
    """An expert of routers for people."""
    return _parameters_in_words(expert) if isinstance(expert, tuple) else f"{expert:.12g}"


def order_of(expert: float | Parameters) -> tuple[float, str]:
    """By what experts of several routers are sorted: base angles first, the smallest before the others."""
    return (math.inf, repr(expert)) if isinstance(expert, tuple) else (expert, "")


def rules_of(experts: Sequence[RopeExpert]) -> list[dict[str, Any]]:
    """The rules that stand for `experts`, in JSON's types; the inverse of [`experts_of`]."""
    rules = []
    for expert in experts:
        queries = {"query_positions": [expert.first, expert.end]}
        if expert.far is None:
            rules.append({**queries, **in_json(expert.near)})
            continue
        for parameters, first, end in ((expert.near, 0, expert.start), (expert.far, expert.start, None)):
            rules.append({**queries, "distances": [first, end], **in_json(parameters)})
    return rules


def in_json(parameters: Parameters) -> dict[str, Any]:
    """Rope parameters in JSON's types."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters}


def facts_of(experts: Sequence[RopeExpert]) -> dict[str, str]:
    """Names and values of a table about ropes by position."""
    return {f"Rule {number}": expert.in_words() for number, expert in enumerate(experts, start=1)}


def _expert(queries: tuple[int, int | None], parts: list[tuple[int, int | None, Parameters]]) -> RopeExpert:
    parts = sorted(parts, key=lambda part: part[0])
    starts, ends = [start for start, _, _ in parts], [end for _, end, _ in parts]
    if starts[0] != 0 or ends[-1] is not None or ends[:-1] != starts[1:]:
        raise ValueError(
            f"The `distances` of `ropes` for the query positions {list(queries)} are "
            f"{[list(part[:2]) for part in parts]}. They have to begin at 0, follow each other without gaps, and go "
            f"on without end (null). Where ropes overlap, routers have to choose, which these rules have not. {_TWO}"
        )
    if len(parts) > 2:
        raise ValueError(
            f"`ropes` cuts the distances of the query positions {list(queries)} into {len(parts)} ranges; near and "
            "far are all there is. Join some of them."
        )
    near, first, end = parts[0][2], *queries
    if len(parts) == 1:
        return RopeExpert(near, first=first, end=end)
    if near:
        raise ValueError(
            f"`ropes` gives near keys another rope than the model's own ({dict(near)}) where far keys have one of "
            "their own. Leave out the parameters of the near one."
        )
    return RopeExpert(near, parts[1][2], parts[1][0], first, end)


def _range_of(rule: dict[str, Any], name: str, where: str) -> tuple[int, int | None]:
    value = rule.get(name)
    if value is None:
        return 0, None
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or type(value[0]) is not int or not (value[1] is None or type(value[1]) is int):
        raise TypeError(
            f"`{name}` of `{where}` has to be a list of two integers, first and end, of which the end may be null, "
            f"not {shortened(value)}."
        )
    first, end = value
    if first < 0 or (end is not None and end <= first) or max(first, end or 0) >= NEVER:
        raise ValueError(f"`{name}` of `{where}` is {shortened(value)}, but has to hold at least one, from 0 on.")
    return first, end


def _parameters_of(rule: dict[str, Any], where: str) -> Parameters:
    unknown = sorted(map(str, rule.keys() - _NAMES))
    if unknown:
        raise ValueError(f"`{where}` has {unknown}; a rope may have {sorted(_NAMES)}.")
    parameters = {name: value for name, value in rule.items() if name not in _RANGES and value is not None}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _TYPES:
        changes = " (its angles change with the length, so that keys in a cache would not fit)"
        raise ValueError(
            f"`rope_type` of `{where}` is {shortened(rope_type)}{changes if rope_type == 'dynamic' else ''}; choose "
            f"one of {list(_TYPES)}."
        )
    for name in _NUMBERS:
        value = parameters.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` of `{where}` has to be a number, not {shortened(value)}.")
        if not (0 < value < math.inf) or (name == "factor" and value < 1):
            least = "at least 1" if name == "factor" else "positive and finite"
            raise ValueError(f"`{name}` of `{where}` is {value}, but has to be {least}.")
    if not isinstance(parameters.get("truncate", True), bool):
        raise TypeError(f"`truncate` of `{where}` has to be true or false, not {shortened(parameters['truncate'])}.")
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name, [1.0])
        if not isinstance(factors, (list, tuple)) or not all(
            type(factor) in (int, float) and 0 < factor < math.inf for factor in factors
        ):
            raise TypeError(f"`{name}` of `{where}` has to be a list of positive numbers, not {shortened(factors)}.")
        if name in parameters:
            parameters[name] = tuple(map(float, factors))
    return tuple(sorted(parameters.items()))


def active(experts: Sequence[RopeExpert], first: int, last: int) -> list[int]:
    """The experts that hold for some query position from `first` to `last`; the last of all holds beyond its end."""
    ends = [*(expert.end for expert in experts[:-1]), None]
    return [
        index
        for index, (expert, end) in enumerate(zip(experts, ends, strict=True))
        if expert.first <= last and (end is None or end > first)
    ]


def longest(experts: Iterable[RopeExpert]) -> int | None:
    """The position behind the last that the experts are made for, or None."""
    ends = [expert.end for expert in experts]
    return None if None in ends else max(end for end in ends if end is not None)
