"""A layer's mixture: several routers over the layer's distinct angles, and the forward pass that applies it."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..attention import MixtureCall, bypassed, known_implementation
from ..attention.interface import KEYWORD
from ..rope import LayerRope, RotationTable
from ..rope.layer_rope import Experts
from ..rope.longrope import rope_of_pass
from ..rope.positions import Positions, positions_of_pass
from ..rope.rotary_hooks import attach_rotary_hooks
from ..rope.rules import RopeExpert, Ropes, active, longest, order_of
from ..rope.turned_keys import TurnedKeys
from .router import MoICERouter
from .spec import RouterSpec

logger = logging.getLogger(__name__)


@dataclass
class RouterShare:
    """One router's part in a layer's mixture.

    Attributes:
        name: under which its records are collected.
        router: the router.
        spec: its angles and `top_k`.
        weight: its share of the mixture, a number or one per row of the batch `[B]`. The shares of a row sum to one,
            or to less where the rest goes to the model's own angle.
    """

    name: str
    router: MoICERouter
    spec: RouterSpec
    weight: float | torch.Tensor = 1.0


@dataclass(frozen=True)
class RopesByPosition:
    """The ropes that queries have by their positions, in place of routers or around them.

    Attributes:
        experts: them, by their query positions from 0 on. Where one is the model's own, routers decide if there are.
        implementation: attention implementation to force, or "auto".
    """

    experts: tuple[RopeExpert, ...]
    implementation: str = "auto"


@dataclass
class RouterRecord:
    """What one router decided in one forward pass of one layer.

    Attributes:
        share: the router and its part in the layer.
        logits: `[B, H, S, N]`, in the graph of the pass.
        gates: `[B, H, S, N]` in float32, without gradient.
    """

    share: RouterShare
    logits: torch.Tensor
    gates: torch.Tensor


class Recorder(Protocol):
    """Receives what layers decide."""

    def take(self, layer: "MixesAngles", records: list[RouterRecord]) -> None: ...


class Gating(NamedTuple):
    """A layer's decision about its queries.

    Attributes:
        gates: `[B, H, S, N]` in float32 over the layer's distinct angles.
        picked: `[B, H, S, N]`, true where the gate has a gradient; None for where it is not zero.
        records: one per router.
    """

    gates: torch.Tensor
    picked: torch.Tensor | None
    records: list[RouterRecord]


@dataclass
class LayerMixture:
    """The weighted mean of its routers' mixtures, with equal angles computed once.

    Attributes:
        shares: the routers that take part.
        rope: the layer's rotary embedding.
        own_weight: share of the model's own angle, a number or one per row of the batch `[B]`. Default: 0.
        by_position: the ropes of queries by their positions. Default: None, the routers decide everywhere.
    """

    shares: list[RouterShare]
    rope: LayerRope
    own_weight: float | torch.Tensor = 0.0
    by_position: RopesByPosition | None = None
    _rope_bases: Ropes | None = field(default=None, init=False, repr=False, compare=False)
    _fixed: tuple[int, str] | None = field(default=None, init=False, repr=False, compare=False)

    def rope_bases(self) -> Ropes:
        """The N distinct base angles and ropes: in the order of a single router, else the smallest first, then ropes.

        So combinations of the same adapters in another order have the same tables of rotations.
        """
        if self._rope_bases is None:
            self._rope_bases = self._find_rope_bases()
        return self._rope_bases

    def _find_rope_bases(self) -> Ropes:
        of_shares = [share.spec.bases_of(self.rope.layer_type) for share in self.shares]
        has_own = isinstance(self.own_weight, torch.Tensor) or bool(self.own_weight)
        if len(of_shares) == 1 and not has_own:
            return tuple(dict.fromkeys(of_shares[0]))
        own = (self.rope.rope_theta,) if has_own else ()
        return tuple(sorted({*own, *(base for bases in of_shares for base in bases)}, key=order_of))

    def gate(self, query: torch.Tensor, rope_bases: Ropes) -> Gating:
        """The gates over `rope_bases` for queries `[B, H, S, D]`."""
        mixed: torch.Tensor | None = None
        picked: torch.Tensor | None = None
        records = []
        for share in self.shares:
            bases = share.spec.bases_of(self.rope.layer_type)
            columns = None if bases == rope_bases else [rope_bases.index(base) for base in bases]
            logits = share.router(query)
            gates = share.router.gates(logits, share.spec.top_k)
            learns = share.router.picks(logits, share.spec.top_k)
            records.append(RouterRecord(share, logits, gates.detach()))
            if learns is not None:
                learns = in_columns(learns.float(), columns, len(rope_bases)) > 0
                picked = learns if picked is None else picked | learns
            gates = _weighted(in_columns(gates, columns, len(rope_bases)), share.weight)
            mixed = gates if mixed is None else mixed + gates
        if isinstance(self.own_weight, torch.Tensor) or self.own_weight:
            own = query.new_zeros(*query.shape[:-1], len(rope_bases), dtype=torch.float32)
            own[..., rope_bases.index(self.rope.rope_theta)] = 1.0
            own = _weighted(own, self.own_weight)
            mixed = own if mixed is None else mixed + own
        assert mixed is not None  # there is a router, or a share of the model's own angle
        return Gating(mixed, None if picked is None else picked | (mixed != 0), records)

    def implementation(self) -> str:
        """The implementation that the adapters' configs force, or "auto"."""
        forced = {share.spec.implementation for share in self.shares}
        forced |= set() if self.by_position is None else {self.by_position.implementation}
        forced = {known_implementation(name) for name in forced} - {"auto"}
        if len(forced) > 1:
            raise ValueError(
                f"The active adapters (routers: {[share.name for share in self.shares]}) force different "
                f"implementations {sorted(forced)}. Set `implementation` to the same value, or to 'auto', in their "
                "configs."
            )
        return forced.pop() if forced else "auto"

    def call_of_pass(self, layer_idx: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MixtureCall | None:
        """What makes an attention module compute this mixture, or None without routers: its own attention is meant.

        The pass is noted on its cache in either case. Has to be called before the module runs.

        Args:
            layer_idx: the layer's index in the cache; None where it has no place in one.
            args: positional arguments of the attention module.
            kwargs: its keyword arguments.
        """
        has_routers = len(self.shares) > 0  # torch 2.11 cannot trace the truth of a list
        mixes = has_routers or self.by_position is not None
        positions = positions_of_pass(layer_idx, args, kwargs, mixes)
        rope = rope_of_pass(self.rope, positions, mixes, self.by_position is not None)
        chosen = self._ropes_of(positions)
        if not all(expert.is_own for expert in chosen):
            return self._call_by_position(chosen, rope, positions)
        return self._call_of_routers(rope, positions) if has_routers else None

    def _ropes_of(self, positions: Positions) -> tuple[RopeExpert, ...]:
        """The ropes by position that some query of the pass has."""
        if self.by_position is None:
            return ()
        experts, extent = self.by_position.experts, positions.extent()
        if extent is None:
            return experts
        end = longest(experts)
        if end is not None and extent[1] >= end:
            _warn_once_of_end(end)
        return tuple(experts[index] for index in active(experts, *extent))

    def _call_by_position(self, chosen: tuple[RopeExpert, ...], rope: LayerRope, positions: Positions) -> MixtureCall:
        """The call of a pass in which queries have the ropes `chosen` by their positions."""
        inner, others = self._inner_and_others(chosen)

        def gate(query: torch.Tensor) -> Gating:
            if len(chosen) == 1 and not inner:
                return Gating(query.new_ones((), dtype=torch.float32).expand(*query.shape[:3], 1), None, [])
            return self.gate_by_position(query, positions.of_queries(query), chosen)

        top_k = self._top_k() if inner else 1
        rotations = rope.table((*inner, *others))
        ends = [*(expert.first for expert in chosen[1:]), None]
        rows_of = {expert: positions.rows_between(expert.first, end) for expert, end in zip(chosen, ends, strict=True)}
        rows = [found for expert in chosen if expert.is_own for found in [rows_of[expert]] * len(inner)]
        rows += [rows_of[expert] for expert in others]
        known = tuple(found for found in rows if found is not None)
        known_rows = known if len(known) == rotations.num_experts else None
        turned = None if inner or torch.compiler.is_compiling() else TurnedKeys.before_pass(positions)
        return MixtureCall(gate, rotations, positions, top_k, self.implementation(), known_rows, turned)

    def _inner_and_others(self, chosen: tuple[RopeExpert, ...]) -> tuple[Ropes, tuple[RopeExpert, ...]]:
        """The experts of the routers where some of `chosen` leave queries to these, and the rest of `chosen`."""
        inner = self.rope_bases() if self.shares and any(expert.is_own for expert in chosen) else ()
        return inner, tuple(expert for expert in chosen if not (inner and expert.is_own))

    def experts_by_position(self) -> Experts:
        """Those of queries at any positions: the routers' experts, then the ropes of [`gate_by_position`]."""
        if self.by_position is None:
            return self.rope_bases()
        inner, others = self._inner_and_others(self.by_position.experts)
        return (*inner, *others)

    def gate_by_position(self, query: torch.Tensor, ids: torch.Tensor, chosen: tuple[RopeExpert, ...]) -> Gating:
        """The gates for queries `[B, H, S, D]` at `ids` `[B or 1, S]`, each of which has one of the ropes `chosen`.

        Routers decide for those with the model's own, if there are routers; their angles come first.
        """
        inner, _ = self._inner_and_others(chosen)
        starts = torch.tensor([expert.first for expert in chosen], device=ids.device)
        last = ((ids[..., None] >= starts).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        holds = (last == torch.arange(len(chosen), device=ids.device)).float()[:, None]
        holds = holds.expand(query.shape[0], query.shape[1], -1, -1)  # [B, H, S, chosen]
        if not inner:
            return Gating(holds, None, [])
        gating = self.gate(query, inner)
        # By numbers, not by booleans: the sizes of graphs must not depend on values.
        inside = [index for index, expert in enumerate(chosen) if expert.is_own]
        outside = [index for index, expert in enumerate(chosen) if not expert.is_own]
        own, rest = holds[..., inside].sum(dim=-1, keepdim=True), holds[..., outside]
        picked = None if gating.picked is None else torch.cat((gating.picked & (own > 0), rest > 0), dim=-1)
        return Gating(torch.cat((gating.gates * own, rest), dim=-1), picked, gating.records)

    def _call_of_routers(self, rope: LayerRope, positions: Positions) -> MixtureCall:
        rope_bases = self.rope_bases()
        rotations: RotationTable = rope.table(rope_bases)
        if self._fixed is None:
            self._fixed = self._top_k(), self.implementation()
        return MixtureCall(lambda query: self.gate(query, rope_bases), rotations, positions, *self._fixed)

    def _top_k(self) -> int:
        """The most angles that a query picks."""
        # An identity scale adds the model's own angle to what its router picks.
        top_k = sum(share.spec.top_k + share.spec.identity for share in self.shares)
        top_k += isinstance(self.own_weight, torch.Tensor)
        return min(top_k, len(self.rope_bases()))


class MixesAngles(nn.Module):
    """Base of modules that apply a [`LayerMixture`].

    Attributes:
        rope: the layer's rotary embedding.
        layer_idx: the layer's index in the model and in caches.
        recorder: receives the records of forward passes; None (default) where nobody asks for them.
    """

    rope: LayerRope
    layer_idx: int | None
    recorder: Recorder | None = None
    _mixture: LayerMixture | None = None

    def shares(self) -> list[RouterShare]:
        """The routers that take part in a forward pass."""
        raise NotImplementedError

    def by_position(self) -> RopesByPosition | None:
        """The ropes by position that take part."""
        raise NotImplementedError

    def mixture(self) -> "LayerMixture":
        """The mixture of [`shares`], in which what follows from them is worked out once until they change."""
        shares, by_position = self.shares(), self.by_position()
        if torch.compiler.is_compiling():
            return LayerMixture(shares, self.rope, by_position=by_position)
        known = self._mixture
        if known is None or known.rope is not self.rope or (known.shares, known.by_position) != (shares, by_position):
            self._mixture = known = LayerMixture(shares, self.rope, by_position=by_position)
        return known

    def mix(
        self,
        mixture: LayerMixture,
        attention: Callable[..., Any],
        layer_idx: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call `attention` so that it computes `mixture`, see [`LayerMixture.call_of_pass`].

        Raises:
            RuntimeError: it computed attention without the mixture.
        """
        call = mixture.call_of_pass(layer_idx, args, kwargs)
        if call is None:
            return attention(*args, **kwargs)
        output = attention(*args, **{KEYWORD: call}, **kwargs)
        self.finish(call, layer_idx)
        return output

    def finish(self, call: MixtureCall, layer_idx: int | None) -> None:
        """Make sure that `call` was computed, and hand its records over."""
        if call.records is None:
            raise bypassed(f"The attention module of layer {layer_idx} did not ask for its mixture")
        call.positions.leave()
        if self.recorder is not None and call.records:
            self.recorder.take(self, call.records)


def in_columns(values: torch.Tensor, columns: list[int] | None, size: int) -> torch.Tensor:
    """Values `[..., M]` in the given columns of `[..., size]`, zero elsewhere; None: they are all columns in order."""
    if columns is None:
        return values
    index = torch.tensor(columns, device=values.device)
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)


def mixes_angles(model: nn.Module) -> bool:
    """Whether some layer of `model` mixes angles in its next pass."""
    return any(
        isinstance(module, MixesAngles) and bool(module.shares() or module.by_position()) for module in model.modules()
    )


def has_ropes_by_position(model: nn.Module) -> bool:
    """Whether the queries of some layer of `model` have ropes by their positions in its next pass."""
    return any(isinstance(module, MixesAngles) and module.by_position() is not None for module in model.modules())


def watch_positions(model: nn.Module) -> None:
    """Let the layers of `model` that mix angles learn what its rotary embeddings are given. May be called again."""
    ropes = [module.rope for module in model.modules() if isinstance(module, MixesAngles)]
    attach_rotary_hooks(model, ropes, mixes_angles, has_ropes_by_position)


@functools.cache
def _warn_once_of_end(end: int) -> None:
    logger.warning(
        "A sequence has reached position %d, the last that its ropes by position are made for. The last of them goes "
        "on to hold; text may become worse. Extend the model by a greater factor.",
        end,
    )


def _weighted(gates: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.to(gates.device, gates.dtype)[:, None, None, None] * gates
    return gates if weight == 1.0 else weight * gates
