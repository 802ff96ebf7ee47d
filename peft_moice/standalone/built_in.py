"""Routers built into an attention module: what merging leaves in place of a wrapper."""

import dataclasses
from typing import Any

from torch import nn

from ..attention import MixtureCall, intercept
from ..attention.interface import KEYWORD
from ..rope import LayerRope
from ..routing.mixture import LayerMixture, MixesAngles, RopesByPosition, RouterShare
from ..routing.router import MoICERouter
from ..routing.spec import RouterSpec

ROUTERS_NAME = "moice_routers"
"""Name of the child module that holds the routers of an attention module."""


class BuiltInRouters(MixesAngles, nn.ModuleList):
    """The routers of the attention module that they are a child of.

    A forward pre-hook hands that module the mixture. It runs whatever the module's `forward` has become in the hands
    of accelerate, quantizers or torch.compile.

    Args:
        routers: the routers.
        specs: what each of them is; `weight` is its share in this layer.
        rope: the module's rotary embedding.
        num_heads: H, its number of query heads.
        head_dim: D, the size of a query.
        by_position: the ropes of queries by their positions. Default: None.
    """

    def __init__(
        self,
        routers: list[MoICERouter],
        specs: list[RouterSpec],
        rope: LayerRope,
        num_heads: int,
        head_dim: int,
        by_position: RopesByPosition | None = None,
    ):
        super().__init__(routers)
        self.rope = rope
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.router_specs = specs
        self.ropes_by_position = by_position
        if routers:
            rope.prepare(LayerMixture(self.shares(), rope).rope_bases())
        if by_position is not None:
            rope.prepare(by_position.experts)

    def by_position(self) -> RopesByPosition | None:
        return self.ropes_by_position

    def shares(self) -> list[RouterShare]:
        return shares_of(self, self.router_specs)

    def install(self, attention: nn.Module) -> None:
        """Make `attention` apply the routers. Undone by [`remove`][BuiltInRouters.remove]."""
        intercept(attention)
        self.layer_idx = _index(attention)
        setattr(attention, ROUTERS_NAME, self)
        self._handles = (
            attention.register_forward_pre_hook(self._add_mixture, with_kwargs=True),
            attention.register_forward_hook(self._finish, with_kwargs=True),
        )

    def remove(self, attention: nn.Module) -> None:
        """Undo [`install`], but leave the attention function intercepted."""
        for handle in self._handles:
            handle.remove()
        delattr(attention, ROUTERS_NAME)

    def _add_mixture(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = self.mixture().call_of_pass(_index(attention), args, kwargs)
        return args, kwargs if call is None else {**kwargs, KEYWORD: call}

    def _finish(self, attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call: MixtureCall | None = kwargs.get(KEYWORD)
        if call is not None:
            self.finish(call, _index(attention))


def shares_of(routers: nn.ModuleList, specs: list[RouterSpec]) -> list[RouterShare]:
    """The shares of built-in `routers`, which `specs` describe."""
    found: Any = routers  # a ModuleList's type does not say what it holds
    pairs = zip(found, specs, strict=True)
    return [RouterShare(str(index), router, spec, spec.weight) for index, (router, spec) in enumerate(pairs)]


def _index(attention: nn.Module) -> int | None:
    # As it is now: those who drop layers count the remaining ones anew.
    return getattr(attention, "layer_idx", None)


def build_in(
    attention: nn.Module,
    rope: LayerRope,
    num_heads: int,
    head_dim: int,
    shares: list[RouterShare],
    by_position: RopesByPosition | None = None,
) -> None:
    """Build copies of the shares' routers, and ropes by position, into an attention module, in place.

    Undone by [`BuiltInRouters.remove`], of the module's child.
    """
    # Built-in routers are frozen, so training has no balance loss for them.
    specs = [dataclasses.replace(s.spec, weight=float(s.weight), router_aux_loss_coef=0.0) for s in shares]
    routers = []
    for share in shares:
        # Made anew, because a copy would take along what others have hooked onto the adapter's router. In float32
        # whatever the model's dtype, as PEFT keeps adapters, so that a reloaded model chooses the same experts.
        router = MoICERouter.from_spec(share.spec, rope.layer_type, num_heads, share.router.head_dim)
        weights = {name: weight.detach().float().clone() for name, weight in share.router.state_dict().items()}
        router.load_state_dict(weights, assign=True)  # spread over processes where the adapter's are
        routers.append(router.requires_grad_(False))
    BuiltInRouters(routers, specs, rope, num_heads, head_dim, by_position).install(attention)
