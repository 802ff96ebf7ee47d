"""A layer's mixture: several routers over the layer's distinct angles, and the forward pass that applies it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import MixtureCall
from .config import RouterSpec
from .rope import LayerRope, RotationTable
from .rope.longrope import rope_of_pass
from .rope.positions import positions_of_pass
from .rope.rotary_hooks import attach_rotary_hooks
from .router import MoICERouter


@dataclass
class Member:
    """One router's part in a layer's mixture.

    Attributes:
        name: under which its logits are collected.
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
class LayerMixture:
    """The weighted mean of its members' mixtures, with equal angles computed once.

    Attributes:
        members: the routers that take part.
        rope: the layer's rotary embedding.
        own_weight: share of the model's own angle, a number or one per row of the batch `[B]`. Default: 0.
    """

    members: list[Member]
    rope: LayerRope
    own_weight: float | torch.Tensor = 0.0

    def rope_bases(self) -> tuple[float, ...]:
        """The distinct base angles `[N]`: in the order of a single member, else the smallest first.

        So combinations of the same adapters in another order have the same tables of rotations.
        """
        of_members = [tuple(member.spec.bases_of(self.rope.layer_type)) for member in self.members]
        has_own = isinstance(self.own_weight, torch.Tensor) or bool(self.own_weight)
        if len(of_members) == 1 and not has_own:
            return tuple(dict.fromkeys(of_members[0]))
        return tuple(
            sorted({*((self.rope.rope_theta,) if has_own else ()), *(b for bases in of_members for b in bases)})
        )

    def gates(
        self, query: torch.Tensor, rope_bases: tuple[float, ...], layer: "MixesAngles | None" = None
    ) -> torch.Tensor:
        """Gates `[B, H, S, N]` in float32 over `rope_bases` for queries `[B, H, S, D]`.

        `layer` is told the logits and gates of every member.
        """
        mixed = None
        for member in self.members:
            logits = member.router(query)
            if layer is not None:
                logits = layer.track_logits(member.name, logits)
            gates = member.router.gates(logits, member.spec.top_k)
            if layer is not None and layer.router_gates is not None:
                layer.router_gates[member.name] = gates.detach()
            columns = [rope_bases.index(base) for base in member.spec.bases_of(self.rope.layer_type)]
            if columns != list(range(len(rope_bases))):
                index = torch.tensor(columns, device=gates.device)
                gates = gates.new_zeros(*gates.shape[:-1], len(rope_bases)).index_add(-1, index, gates)
            gates = _weighted(gates, member.weight)
            mixed = gates if mixed is None else mixed + gates
        if isinstance(self.own_weight, torch.Tensor) or self.own_weight:
            own = query.new_zeros(*query.shape[:-1], len(rope_bases), dtype=torch.float32)
            own[..., rope_bases.index(self.rope.rope_theta)] = 1.0
            own = _weighted(own, self.own_weight)
            mixed = own if mixed is None else mixed + own
        return mixed

    def implementation(self) -> str:
        """The implementation that the members force, or "auto"."""
        forced = {member.spec.implementation for member in self.members} - {"auto"}
        if len(forced) > 1:
            raise ValueError(
                f"The routers {[member.name for member in self.members]} force different implementations "
                f"{sorted(forced)}. Set `implementation` to the same value, or to 'auto', in their configs."
            )
        return forced.pop() if forced else "auto"

    def run(
        self,
        attention: Callable,
        layer_idx: int | None,
        args: tuple,
        kwargs: dict[str, Any],
        layer: "MixesAngles | None" = None,
    ) -> Any:
        """Call an attention module so that its attention function computes this mixture.

        Without members it computes what it always does; the pass is noted on its cache all the same.

        Args:
            attention: the module; its attention function has to be intercepted.
            layer_idx: the layer's index in the cache.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            layer: is told the router logits and gates of this pass.

        Raises:
            RuntimeError: the module computed attention without the mixture.
        """
        call = self.call_of_pass(layer_idx, args, kwargs, layer)
        if call is None:
            return attention(*args, **kwargs)
        output = attention(*args, **call.as_keyword(), **kwargs)
        call.check_was_asked(layer_idx)
        return output

    def call_of_pass(
        self, layer_idx: int | None, args: tuple, kwargs: dict[str, Any], layer: "MixesAngles | None" = None
    ) -> MixtureCall | None:
        """What makes an attention module compute this mixture, or None without members; arguments as for [`run`]."""
        mixes = len(self.members) > 0
        positions = positions_of_pass(layer_idx, args, kwargs, mixes)
        rope = rope_of_pass(self.rope, positions, mixes)
        if not mixes:
            return None
        rope_bases = self.rope_bases()
        rotations: RotationTable = rope.table(rope_bases)

        def gate(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            gates = self.gates(query, rope_bases, layer)
            # An identity scale of zero closes gates that have a gradient all the same.
            closed_gates_learn = any(member.router.identity_scale is not None for member in self.members)
            picked = torch.ones_like(gates, dtype=torch.bool) if closed_gates_learn and gates.requires_grad else None
            return gates, picked

        return MixtureCall(gate, rotations, positions, self.implementation())


class MixesAngles(nn.Module):
    """Base of modules that apply a [`LayerMixture`].

    Attributes:
        router_logits: None, or a dict in which forward passes leave the logits `[B, H, S, N]` of their routers.
        router_gates: likewise for their gates, without gradient.
        late_gradients: gradients of the balance loss that wait for reentrant checkpointing to run the layer again,
            by router, oldest first; None where none are due.
        was_called: whether a pass has called the module; noted until [`watch_first_pass`] has seen all of them.
    """

    router_logits: dict[str, torch.Tensor] | None = None
    router_gates: dict[str, torch.Tensor] | None = None
    late_gradients: dict[str, list[torch.Tensor]] | None = None
    was_called: bool = False

    def members(self) -> list[Member]:
        """The routers that take part in a forward pass."""
        raise NotImplementedError

    def track_logits(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        """Note the logits of a router, and return what the pass should go on with."""
        if self.router_logits is not None:
            self.router_logits[name] = logits
        elif self.late_gradients is not None and logits.requires_grad and self.late_gradients.get(name):
            logits = _AddGradient.apply(logits, self.late_gradients[name].pop(0))
        return logits


class _AddGradient(torch.autograd.Function):
    """The identity, with `gradient` added to the gradient on the way back."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return grad_output + gradient.to(grad_output.dtype), None


def mixes_angles(model: nn.Module) -> bool:
    """Whether some layer of `model` mixes angles in its next pass."""
    return any(isinstance(module, MixesAngles) and module.members() for module in model.modules())


def watch_positions(model: nn.Module) -> None:
    """Let the layers of `model` that mix angles learn what its rotary embeddings are given. May be called again."""
    ropes = [module.rope for module in model.modules() if isinstance(module, MixesAngles)]
    attach_rotary_hooks(model, ropes, mixes_angles)


def _weighted(gates: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.to(gates.device, gates.dtype)[:, None, None, None] * gates
    return gates if weight == 1.0 else weight * gates
