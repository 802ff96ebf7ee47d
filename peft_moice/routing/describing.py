"""What routers are, in words."""

from collections.abc import Callable, Sequence

from ..rope.rules import Base, expert_in_words, expert_of
from .spec import Bases, RouterSpec


def router_facts(specs: Sequence[RouterSpec]) -> dict[str, str]:
    """Names and values of a table about routers. Names of layer types in it may come from strangers' files."""
    facts: dict[str, str] = {}
    for number, spec in enumerate(specs, start=1):
        which = "" if len(specs) == 1 else f"Router {number} of {len(specs)}, share {spec.weight:g}: "
        facts |= {f"{which}{name}": value for name, value in _facts_of(spec).items()}
    return facts


def router_in_a_line(spec: RouterSpec) -> str:
    """Base angles and K."""
    angles = _by_layer_type(spec.rope_bases, _in_a_line, "{angles} in layers of type {kind}")
    return f"rope_theta {angles}, K = {spec.top_k} of {spec.num_experts}"


def _facts_of(spec: RouterSpec) -> dict[str, str]:
    return {
        "Base angles (`rope_theta`)": _by_layer_type(spec.rope_bases, _angles, "{kind}: {angles}"),
        "Angles mixed (`top_k`)": f"{spec.top_k} of {spec.num_experts} per head and token",
        "Routers": "one per head" if spec.router_scope == "head" else "one per layer, shared by its heads",
        "Hidden size of a router": f"{spec.router_dim}, {spec.hidden_act}",
        "Identity scale": "one per head" if spec.identity else "none",
        "Balance loss (`router_aux_loss_coef`)": f"{spec.router_aux_loss_coef:g}",
    }


def _by_layer_type(rope_bases: Bases, in_words: Callable[[list[Base]], str], form: str) -> str:
    if not isinstance(rope_bases, dict):
        return in_words(rope_bases)
    return "; ".join(form.format(kind=kind, angles=in_words(bases)) for kind, bases in rope_bases.items())


def _in_a_line(bases: list[Base]) -> str:
    multiples = _multiples(bases)
    return f"{bases[0]:.12g} times {multiples}" if multiples else _angles(bases)


def _angles(bases: list[Base]) -> str:
    multiples = _multiples(bases)
    named = ("; " if multiples is None else ", ").join(map(expert_in_words, map(expert_of, bases)))
    return named if multiples is None else f"{named} ({multiples} times the first)"


def _multiples(bases: list[Base]) -> str | None:
    """Base angles as multiples of the first; None where there are ropes among them."""
    angles = [base for base in bases if isinstance(base, float)]
    return ", ".join(f"{angle / angles[0]:.4g}" for angle in angles) if len(angles) == len(bases) else None
