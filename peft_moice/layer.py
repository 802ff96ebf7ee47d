"""`MoICELayer`: one attention module and the routers of its adapters."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import IMPLEMENTATIONS, Mixture, intercept, restore
from .config import MoICEConfig
from .positions import find_cache, query_start
from .rope import LayerRope, RotationTable
from .router import Member, MoICERouter, mix_gates


class MoICELayer(nn.Module, BaseTunerLayer):
    """Wraps an attention module so that it mixes several rotary base angles.

    Args:
        base_layer: the model's attention module. Its `config` is exchanged for a copy until [`unload`].
        rope: its rotary embedding.
        num_heads: H, its number of query heads.
        head_dim: D, the size of its query vectors.

    Attributes:
        moice_router: the router of each adapter.
        router_logits: None, or a dict in which forward passes leave each active adapter's router logits.
    """

    adapter_layer_names = ("moice_router",)
    other_param_names = ("rope_bases", "top_k", "router_aux_loss_coef", "implementation")

    def __init__(self, base_layer: nn.Module, rope: LayerRope, num_heads: int, head_dim: int):
        super().__init__()
        self.base_layer = base_layer
        self.rope = rope
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.moice_router = nn.ModuleDict()
        self.rope_bases: dict[str, tuple[float, ...]] = {}
        self.top_k: dict[str, int] = {}
        self.router_aux_loss_coef: dict[str, float] = {}
        self.implementation: dict[str, str] = {}
        self.router_logits: dict[str, torch.Tensor] | None = None
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        intercept(base_layer)

    def update_layer(self, adapter_name: str, config: MoICEConfig) -> None:
        """Add a router for `adapter_name`, or replace it."""
        bases = config.bases_of(self.rope.layer_type)
        self.rope_bases[adapter_name] = bases
        self.top_k[adapter_name] = config.top_k
        self.router_aux_loss_coef[adapter_name] = config.router_aux_loss_coef
        self.implementation[adapter_name] = config.implementation
        self.moice_router[adapter_name] = MoICERouter(
            self.head_dim,
            len(bases),
            config.router_dim,
            config.hidden_act,
            num_heads=self.num_heads if config.router_scope == "head" else None,
            identity_heads=self.num_heads if config.init_weights == "identity" else None,
        )
        self.reset_moice_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_moice_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the router's weights anew, see [`MoICERouter.reset_parameters`]."""
        if adapter_name in self.moice_router:
            self.moice_router[adapter_name].reset_parameters(init_weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = [name for name in self.active_adapters if name in self.moice_router]
        if self.disable_adapters or not adapters:
            return self.base_layer(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        members, rotations = self._mixture_of(tuple(adapters))

        def gate(query: torch.Tensor) -> torch.Tensor:
            logits = [member.router(query) for member in members]
            if self.router_logits is not None:
                self.router_logits.update(zip(adapters, logits, strict=True))
            return mix_gates(members, logits, rotations.num_experts)

        mixture = Mixture(
            gate,
            rotations,
            query_start(find_cache(args, kwargs), hidden_states.shape[-2], self.base_layer.layer_idx),
            self._implementation_of(adapters),
        )
        return self.base_layer(*args, **mixture.as_keyword(), **kwargs)

    def _mixture_of(self, adapters: tuple[str, ...]) -> tuple[list[Member], RotationTable]:
        """The routers of `adapters` in equal shares, and the rotations of their distinct angles."""
        bases = tuple(dict.fromkeys(base for name in adapters for base in self.rope_bases[name]))
        members = [
            Member(
                self.moice_router[name],
                self.top_k[name],
                tuple(bases.index(base) for base in self.rope_bases[name]),
                1.0 / len(adapters),
            )
            for name in adapters
        ]
        return members, self.rope.table(bases)

    def _implementation_of(self, adapters: list[str]) -> str:
        forced = {self.implementation[name] for name in adapters} - {"auto"}
        if len(forced) > 1:
            raise ValueError(
                f"The active adapters {adapters} force different implementations {sorted(forced)}. Set "
                "`implementation` to the same value, or to 'auto', in their configs."
            )
        return forced.pop() if forced else "auto"

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The model's own attention module, with its own config object. Called by PEFT's `unload`."""
        if merge:
            raise NotImplementedError("MoICE adapters cannot be merged yet.")
        restore(self.base_layer)
        return self.base_layer

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # An attention module has no weight of its own; PEFT's version would leave the routers where they were made.
        device = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
        parameters = list(base_layer.parameters())
        weight = next((p for p in parameters if p.is_floating_point()), None)
        if device is None and parameters:
            device = parameters[0].device
        return (None if device is None else torch.device(device)), (None if weight is None else weight.dtype)

    def __getattr__(self, name: str) -> Any:
        # Decoder layers read attributes of their attention module.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def __repr__(self) -> str:
        return "moice." + super().__repr__()


def check_implementation(name: str) -> None:
    """Raise ValueError unless `name` is an implementation of the operator, or "auto"."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` is {name!r}; choose 'auto' or one of {sorted(IMPLEMENTATIONS)}.")
