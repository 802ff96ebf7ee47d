"""`RouterSpec`: what one router is, with everything resolved, and the checks of what describes it."""

import itertools
import sys
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from reprlib import repr as shortened
from typing import Any

from transformers.activations import ACT2FN

from ..rope.rules import Base, Ropes, checked_rope, expert_of

PEFT_TYPE_NAME = "MOICE"
"""Name of the `PeftType` member that `tuner/registration.py` adds."""

MAX_EXPERTS = 1024
"""Most experts of a router. Far above anything useful; what damaged or hostile files ask for."""

Bases = list[Base] | dict[str, list[Base]]
"""The experts of a router, of every layer or by layer type."""


@dataclass
class RouterSpec:
    """What one router is, with everything resolved: the part of a config that a layer needs.

    Attributes:
        rope_bases: its experts: absolute base angles, and dicts of rope parameters over the model's own; or a dict of
            such lists by layer type.
        top_k: number K of experts kept.
        router_dim: hidden size R.
        router_scope: "layer" or "head".
        hidden_act: activation.
        identity: whether it has an identity scale.
        router_aux_loss_coef: weight of its balance loss.
        implementation: attention implementation to force, or "auto".
        weight: its share in the adapter's mixture.
    """

    rope_bases: Bases
    top_k: int
    router_dim: int
    router_scope: str
    hidden_act: str
    identity: bool = False
    router_aux_loss_coef: float = 0.0
    implementation: str = "auto"
    weight: float = 1.0

    @classmethod
    def from_saved(cls, fields: object, where: str) -> "RouterSpec":
        """The router that a file describes, with everything in it checked.

        Args:
            fields: what the file says, which may be anything.
            where: what to call it in errors.

        Raises:
            ValueError: a field is missing, unknown or out of its range.
            TypeError: a value of the wrong type.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"`{where}` has to hold the fields of a router, not {shortened(fields)}.")
        names = {name.name for name in dataclass_fields(cls)}
        required = {"rope_bases", "top_k", "router_dim", "router_scope", "hidden_act"}
        if not required <= fields.keys() <= names or any(fields[name] is None for name in required):
            raise ValueError(
                f"`{where}` has the fields {shortened(sorted(map(str, fields)))}; a router has {sorted(required)}, "
                f"and may have {sorted(names - required)}. Save the adapter or the model anew."
            )
        spec = cls(**fields)
        try:
            spec.rope_bases = checked_bases(spec.rope_bases)
            check_router(spec)
            check_number(spec.weight, "weight")
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `{where}`: {error}") from error
        if not isinstance(spec.identity, bool) or not isinstance(spec.implementation, str) or spec.weight <= 0:
            raise ValueError(
                f"`{where}` has `identity` {shortened(spec.identity)}, `implementation` "
                f"{shortened(spec.implementation)} and `weight` {shortened(spec.weight)}, but they have to be "
                "true or false, a name, and a positive number."
            )
        return spec

    def bases_of(self, layer_type: str | None) -> Ropes:
        """The N experts in layers of `layer_type` (None where the model has one set for all)."""
        return tuple([expert_of(base) for base in bases_of(self.rope_bases, layer_type)])

    @property
    def num_experts(self) -> int:
        """Number N of experts."""
        return count_experts(self.rope_bases)


def count_experts(rope_bases: Bases | list[float]) -> int:
    """Number N of experts that base angles stand for; the most of any layer type."""
    return max(map(len, rope_bases.values())) if isinstance(rope_bases, dict) else len(rope_bases)


def bases_of(rope_bases: Bases, layer_type: str | None) -> list[Base]:
    if not isinstance(rope_bases, dict):
        return rope_bases
    assert layer_type is not None  # `resolve_bases` has compared the layer types with the model's
    return rope_bases[layer_type]


def check_router(fields: Any, may_differ: bool = False) -> None:
    """Check what a [`RouterSpec`] or a `MoICEConfig` says of a router, fields that are None left open.

    With `may_differ`, `router_scope` and `router_aux_loss_coef` may be open as well.

    Raises:
        ValueError: a value out of its range.
        TypeError: a value of the wrong type.
    """
    top_k, router_dim, router_scope = fields.top_k, fields.router_dim, fields.router_scope
    hidden_act, router_aux_loss_coef = fields.hidden_act, fields.router_aux_loss_coef
    for name, value in {"top_k": top_k, "router_dim": router_dim}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"`{name}` has to be an integer or None, not {shortened(value)}.")
    if top_k is not None and not 1 <= top_k <= fields.num_experts:
        raise ValueError(
            f"`top_k` is {top_k}, but has to lie in 1..{fields.num_experts}, the number of angles. Lower it, or give "
            "more angles with `rope_bases` or `base_multipliers`."
        )
    if router_dim is not None and router_dim < 1:
        raise ValueError(f"`router_dim` is {router_dim}, but has to be at least 1.")
    if router_scope not in ("layer", "head") and not (may_differ and router_scope is None):
        raise ValueError(
            f"`router_scope` is {shortened(router_scope)}; choose 'layer' (a router shared by a layer's heads) or "
            "'head' (a router per head)."
        )
    if hidden_act is not None and (not isinstance(hidden_act, str) or hidden_act not in ACT2FN):
        raise ValueError(f"`hidden_act` is {shortened(hidden_act)}; choose one of {sorted(ACT2FN)}.")
    if may_differ and router_aux_loss_coef is None:
        return
    if check_number(router_aux_loss_coef, "router_aux_loss_coef") < 0:
        raise ValueError(
            f"`router_aux_loss_coef` is {router_aux_loss_coef}, but has to be a finite number of at least 0; 0 "
            "switches the balance loss off."
        )


def checked_bases(rope_bases: Any, may_differ: bool = False) -> Bases:
    """Base angles as floats and ropes in JSON's types, after checks.

    With `may_differ`, layer types may have different numbers of them.

    Raises:
        ValueError: none, too many, equal ones, ones out of range, or another number of them for some layer type.
        TypeError: no list of numbers.
    """
    if not isinstance(rope_bases, dict):
        return checked_angles(rope_bases, "rope_bases", ropes=True)
    if not rope_bases:
        raise ValueError("`rope_bases` is empty; give at least one angle, or leave it out.")
    checked = {kind: checked_angles(bases, f"rope_bases[{kind!r}]", ropes=True) for kind, bases in rope_bases.items()}
    if not may_differ and len({len(bases) for bases in checked.values()}) > 1:
        raise ValueError("`rope_bases` needs the same number of angles for every layer type.")
    return checked


def check_number(value: object, name: str) -> float:
    """`value`, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` has to be a number, not {shortened(value)}.")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` is {shortened(value)}, but has to be a finite number of at least 0; 0 is none.")
    return value


def checked_angles(values: Any, name: str, ropes: bool = False) -> list[Any]:
    """Base angles as floats, after checks; with `ropes`, ropes in JSON's types may stand among them."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"`{name}` has to be a list of numbers, not {shortened(values)}.")
    values = list(itertools.islice(values, MAX_EXPERTS + 1))
    if not values:
        raise ValueError(f"`{name}` is empty; give at least one angle, or leave it out for the default.")
    if len(values) > MAX_EXPERTS:
        raise ValueError(f"`{name}` holds more than {MAX_EXPERTS} angles, each of which is an expert. Give fewer.")
    angles: list[Any] = []
    for index, value in enumerate(values):
        if ropes and isinstance(value, dict):
            angles.append(checked_rope(value, f"{name}[{index}]"))
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` has to be a list of numbers, but holds {shortened(value)}.")
        if not 0 < value <= sys.float_info.max:
            shown = float(value) if abs(value) <= sys.float_info.max else shortened(value)
            raise ValueError(f"`{name}` holds {shown}; base angles have to be positive and finite.")
        angles.append(float(value))
    if len(set(map(expert_of, angles))) < len(angles):
        raise ValueError(f"`{name}` holds an angle twice: {angles}. Equal angles are the same expert; drop one.")
    if len(angles) > 1 and isinstance(angles[0], dict) and angles[0]:
        raise ValueError(
            f"The first of `{name}` is {shortened(angles[0])}. Where ropes overlap, routers choose among them, and "
            "the first has to be {}, the model's own, because keys in the cache carry it."
        )
    return angles
