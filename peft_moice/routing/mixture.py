"""A layer's mixture: several routers over the layer's distinct angles, and the forward pass that applies it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..attention import MixtureCall, bypassed, known_implementation
from ..rope import LayerRope, RotationTable
from ..rope.longrope import rope_of_pass
from ..rope.positions import positions_of_pass
from ..rope.rotary_hooks import attach_rotary_hooks
from .router import MoICERouter
from .spec import RouterSpec


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
    """

    shares: list[RouterShare]
    rope: LayerRope
    own_weight: float | torch.Tensor = 0.0
    _rope_bases: tuple[float, ...] | None = field(default=None, init=False, repr=False, compare=False)
    _fixed: tuple[int, str] | None = field(default=None, init=False, repr=False, compare=False)

    def rope_bases(self) -> tuple[float, ...]:
        """The distinct base angles `[N]`: in the order of a single router, else the smallest first.

        So combinations of the same adapters in another order have the same tables of rotations.
        """
        if self._rope_bases is None:
            self._rope_bases = self._find_rope_bases()
        return self._rope_bases

    def _find_rope_bases(self) -> tuple[float, ...]:
        of_shares = [tuple(share.spec.bases_of(self.rope.layer_type)) for share in self.shares]
        has_own = isinstance(self.own_weight, torch.Tensor) or bool(self.own_weight)
        if len(of_shares) == 1 and not has_own:
            return tuple(dict.fromkeys(of_shares[0]))
        return tuple(
            sorted({*((self.rope.rope_theta,) if has_own else ()), *(b for bases in of_shares for b in bases)})
        )

    def gate(self, query: torch.Tensor, rope_bases: tuple[float, ...]) -> Gating:
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
                learns = _in_columns(learns.float(), columns, len(rope_bases)) > 0
                picked = learns if picked is None else picked | learns
            gates = _weighted(_in_columns(gates, columns, len(rope_bases)), share.weight)
            mixed = gates if mixed is None else mixed + gates
        if isinstance(self.own_weight, torch.Tensor) or self.own_weight:
            own = query.new_zeros(*query.shape[:-1], len(rope_bases), dtype=torch.float32)
            own[..., rope_bases.index(self.rope.rope_theta)] = 1.0
            own = _weighted(own, self.own_weight)
            mixed = own if mixed is None else mixed + own
        assert mixed is not None  # there is a router, or a share of the model's own angle
        return Gating(mixed, None if picked is None else picked | (mixed != 0), records)

    def implementation(self) -> str:
        """The implementation that the routers' configs force, or "auto"."""
        forced = {known_implementation(share.spec.implementation) for share in self.shares} - {"auto"}
        if len(forced) > 1:
            raise ValueError(
                f"The routers {[share.name for share in self.shares]} force different implementations "
                f"{sorted(forced)}. Set `implementation` to the same value, or to 'auto', in their configs."
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
        mixes = len(self.shares) > 0  # torch 2.11 cannot trace the truth of a list
        positions = positions_of_pass(layer_idx, args, kwargs, mixes)
        rope = rope_of_pass(self.rope, positions, mixes)
        if not mixes:
            return None
        rope_bases = self.rope_bases()
        rotations: RotationTable = rope.table(rope_bases)
        if self._fixed is None:
            # An identity scale adds the model's own angle to what its router picks.
            top_k = sum(share.spec.top_k + share.spec.identity for share in self.shares)
            top_k += isinstance(self.own_weight, torch.Tensor)
            self._fixed = min(top_k, len(rope_bases)), self.implementation()
        return MixtureCall(lambda query: self.gate(query, rope_bases), rotations, positions, *self._fixed)


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

    def mixture(self) -> "LayerMixture":
        """The mixture of [`shares`], in which what follows from them is worked out once until they change."""
        shares = self.shares()
        if torch.compiler.is_compiling():
            return LayerMixture(shares, self.rope)
        if self._mixture is None or self._mixture.rope is not self.rope or self._mixture.shares != shares:
            self._mixture = LayerMixture(shares, self.rope)
        return self._mixture

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
        output = attention(*args, **call.as_keyword(), **kwargs)
        self.finish(call, layer_idx)
        return output

    def finish(self, call: MixtureCall, layer_idx: int | None) -> None:
        """Make sure that `call` was computed, and hand its records over."""
        if not call.records:
            raise bypassed(f"The attention module of layer {layer_idx} did not ask for its mixture")
        call.positions.leave()
        if self.recorder is not None:
            self.recorder.take(self, call.records)


def _in_columns(values: torch.Tensor, columns: list[int] | None, size: int) -> torch.Tensor:
    """Values `[..., M]` in the given columns of `[..., size]`, zero elsewhere; None: they are all columns in order."""
    if columns is None:
        return values
    index = torch.tensor(columns, device=values.device)
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)


def mixes_angles(model: nn.Module) -> bool:
    """Whether some layer of `model` mixes angles in its next pass."""
    return any(isinstance(module, MixesAngles) and module.shares() for module in model.modules())


def watch_positions(model: nn.Module) -> None:
    """Let the layers of `model` that mix angles learn what its rotary embeddings are given. May be called again."""
    ropes = [module.rope for module in model.modules() if isinstance(module, MixesAngles)]
    attach_rotary_hooks(model, ropes, mixes_angles)


def _weighted(gates: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.to(gates.device, gates.dtype)[:, None, None, None] * gates
    return gates if weight == 1.0 else weight * gates
