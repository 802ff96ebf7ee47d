"""A layer's mixture: several routers over the layer's distinct angles, and the forward pass that applies it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .attention import MixtureCall, bypassed
from .config import RouterSpec
from .rope import LayerRope, RotationTable
from .rope.positions import Positions, query_start
from .router import MoICERouter


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

    def rope_bases(self) -> tuple[float, ...]:
        """The distinct angles `[N]` of all routers."""
        bases = [base for share in self.shares for base in share.spec.bases_of(self.rope.layer_type)]
        if isinstance(self.own_weight, torch.Tensor) or self.own_weight:
            bases.insert(0, self.rope.rope_theta)
        return tuple(dict.fromkeys(bases))

    def gate(self, query: torch.Tensor, rope_bases: tuple[float, ...]) -> Gating:
        """The gates over `rope_bases` for queries `[B, H, S, D]`."""
        mixed: torch.Tensor | None = None
        picked: torch.Tensor | None = None
        records = []
        for share in self.shares:
            columns = [rope_bases.index(base) for base in share.spec.bases_of(self.rope.layer_type)]
            logits = share.router(query)
            gates, learns = share.router.gate(logits, share.spec.top_k)
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
        forced = {share.spec.implementation for share in self.shares} - {"auto"}
        if len(forced) > 1:
            raise ValueError(
                f"The routers {[share.name for share in self.shares]} force different implementations "
                f"{sorted(forced)}. Set `implementation` to the same value, or to 'auto', in their configs."
            )
        return forced.pop() if forced else "auto"

    def run(
        self, attention: Callable[..., Any], layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[RouterRecord]]:
        """Call an attention module so that its attention function computes this mixture.

        Args:
            attention: the module, or its forward; its attention function has to be intercepted.
            layer_idx: the layer's index in the cache.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            What the module returned, and the records of the pass.

        Raises:
            RuntimeError: the module computed attention without the mixture.
        """
        rope_bases = self.rope_bases()
        rotations: RotationTable = self.rope.table(rope_bases)
        records: list[RouterRecord] = []

        def gate(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            gating = self.gate(query, rope_bases)
            records.extend(gating.records)
            return gating.gates, gating.picked

        positions = Positions(query_start(layer_idx, args, kwargs))
        call = MixtureCall(gate, rotations, positions, self.implementation())
        output = attention(*args, **call.as_keyword(), **kwargs)
        if not records:
            raise bypassed(f"The attention module of layer {layer_idx} did not ask for its mixture")
        return output, records


class MixesAngles(nn.Module):
    """Base of modules that apply a [`LayerMixture`].

    Attributes:
        layer_idx: the layer's index in the model and in caches.
        recorder: receives the records of forward passes; None (default) where nobody asks for them.
        was_called: whether a pass has called the module; noted until [`watch_first_pass`] has seen all of them.
    """

    layer_idx: int
    recorder: Recorder | None = None
    was_called: bool = False

    def shares(self) -> list[RouterShare]:
        """The routers that take part in a forward pass."""
        raise NotImplementedError

    def mix(
        self,
        mixture: LayerMixture,
        attention: Callable[..., Any],
        layer_idx: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call `attention` under `mixture`, see [`LayerMixture.run`], and hand the records over."""
        output, records = mixture.run(attention, layer_idx, args, kwargs)
        if self.recorder is not None:
            self.recorder.take(self, records)
        return output


def _in_columns(values: torch.Tensor, columns: list[int], size: int) -> torch.Tensor:
    """Values `[..., M]` in the given columns of `[..., size]`, zero elsewhere."""
    if columns == list(range(size)):
        return values
    index = torch.tensor(columns, device=values.device)
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)


def _weighted(gates: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.to(gates.device, gates.dtype)[:, None, None, None] * gates
    return gates if weight == 1.0 else weight * gates
