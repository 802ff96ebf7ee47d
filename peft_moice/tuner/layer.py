"""`MoICELayer`: one attention module and the routers of its adapters."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..attention import intercept, own_config, restore
from ..rope import LayerRope
from ..rope.layer_rope import Experts
from ..routing.mixture import LayerMixture, MixesAngles, RopesByPosition, RouterShare
from ..routing.router import MoICERouter, check_size
from ..routing.spec import RouterSpec
from ..standalone.built_in import ROUTERS_NAME, build_in
from .config import MoICEConfig

BASE_MODEL_NAME = "__base__"
"""Name under which rows of a mixed batch ask for the base model, as in PEFT's LoRA."""


class MoICELayer(MixesAngles, BaseTunerLayer):
    """Wraps an attention module so that it mixes several rotary base angles.

    Args:
        base_layer: the model's attention module. Its `config` is exchanged for a stand-in until the layer is unloaded.
            What is read from the wrapper and assigned to it, other than its own attributes, goes to this module.
        rope: its rotary embedding.
        num_heads: H, its number of query heads.
        head_dim: D, the size of its query vectors.

    Attributes:
        moice_router: the router of each adapter, or a list of routers for an adapter that is a mean of others.
        router_specs: what each adapter's routers are.
        ropes_by_position: the ropes of each adapter that has these in place of routers.
    """

    adapter_layer_names = ("moice_router",)
    other_param_names = ("router_specs", "ropes_by_position")

    def __init__(self, base_layer: nn.Module, rope: LayerRope, num_heads: int, head_dim: int):
        super().__init__()
        self.rope = rope
        self.num_heads = num_heads
        self.head_dim = head_dim
        # Other tools read these from any PEFT layer. Attention leaves the size of hidden states as it is.
        self.in_features = self.out_features = own_config(base_layer).hidden_size
        self.moice_router = nn.ModuleDict()
        self.router_specs: dict[str, list[RouterSpec]] = {}
        self.ropes_by_position: dict[str, RopesByPosition | None] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters = []
        # Comes last: from here on, assignments to what the attention module has go to the attention module.
        self.base_layer = base_layer
        intercept(base_layer)

    @property
    def config(self) -> Any:
        """The model's own config, as it is without the wrapper."""
        return own_config(self.base_layer)

    @config.setter
    def config(self, config: Any) -> None:
        self.base_layer.config = config
        intercept(self.base_layer)

    def update_layer(self, adapter_name: str, config: MoICEConfig) -> None:
        """Add the routers of `adapter_name`, or replace them."""
        specs = config.router_specs()
        check_size(specs, self.rope.layer_type, self.num_heads, self.head_dim, self.base_layer)
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        with torch.device(device or "cpu"):
            routers = [
                MoICERouter.from_spec(spec, self.rope.layer_type, self.num_heads, self.head_dim) for spec in specs
            ]
        self._release_rotations(adapter_name)
        self.router_specs[adapter_name] = specs
        experts = config.ropes_by_position()
        self.ropes_by_position[adapter_name] = RopesByPosition(experts, config.implementation) if experts else None
        is_list = config.members is not None or not routers
        self.moice_router[adapter_name] = nn.ModuleList(routers) if is_list else routers[0]
        self.rope.prepare(self._experts_of(adapter_name))
        self.reset_moice_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT. Tables of rotations that no other adapter uses are freed."""
        self._release_rotations(adapter_name)
        super().delete_adapter(adapter_name)

    def _release_rotations(self, adapter_name: str) -> None:
        if adapter_name in self.moice_router:
            self.rope.release(self._experts_of(adapter_name))

    def _experts_of(self, adapter_name: str) -> Experts:
        by_position = self.ropes_by_position[adapter_name]
        if by_position is not None:
            return by_position.experts
        return LayerMixture(self._shares_of([adapter_name]), self.rope).rope_bases()

    def reset_moice_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the routers' weights anew, see [`MoICERouter.reset_parameters`]."""
        if adapter_name in self.moice_router:
            for router in self.routers(adapter_name):
                router.reset_parameters(init_weights)

    def routers(self, adapter_name: str) -> list[MoICERouter]:
        """The routers of an adapter, in the order of `router_specs[adapter_name]`."""
        router = self.moice_router[adapter_name]
        routers: list[Any] = list(router) if isinstance(router, nn.ModuleList) else [router]
        return routers

    def shares(self) -> list[RouterShare]:
        return [] if self._disable_adapters or self.merged_adapters else self._shares_of(self._active_adapter)

    def by_position(self) -> RopesByPosition | None:
        return None if self._disable_adapters or self.merged_adapters else self._by_position_of(self._active_adapter)

    def _by_position_of(self, adapter_names: list[str]) -> RopesByPosition | None:
        """The ropes by position among those adapters.

        Raises:
            ValueError: several of them have some.
        """
        found = [name for name in adapter_names if self.ropes_by_position.get(name)]
        if len(found) > 1:
            raise ValueError(
                f"The adapters {found} give queries ropes by their positions, and only one can. Activate one of them."
            )
        return self.ropes_by_position[found[0]] if found else None

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        base_layer = self.base_layer
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if adapter_names is not None and not self._disable_adapters:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if len(adapter_names) != hidden_states.shape[0]:
                raise ValueError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(adapter_names)} and {hidden_states.shape[0]}. Give one name per row of the batch."
                )
            by_position = [name for name in set(adapter_names) if self.ropes_by_position.get(name)]
            if by_position:
                raise ValueError(
                    f"`adapter_names` gives rows of a batch the adapter {by_position[0]!r}, whose ropes go by "
                    "position and hold for all rows. Activate it with `set_adapter`, and leave `adapter_names` out."
                )
            shares, own_weight = self._shares_of_rows(adapter_names)
            mixture = LayerMixture(shares, self.rope, own_weight)
        else:
            mixture = self.mixture()
        if self.merged_adapters:
            # Routers built into the attention module look at the pass themselves.
            return base_layer(*args, **kwargs)
        return self.mix(mixture, base_layer, getattr(base_layer, "layer_idx", None), args, kwargs)

    def _shares_of(self, adapter_names: list[str]) -> list[RouterShare]:
        """The routers of those adapters that this layer has, in equal shares per adapter."""
        routers = self.moice_router
        names = [name for name in adapter_names if name in routers and not self.ropes_by_position[name]]
        shares = []
        for name in names:
            specs = self.router_specs[name]
            for index, (router, spec) in enumerate(zip(self.routers(name), specs, strict=True)):
                share_name = name if len(specs) == 1 else f"{name}.{index}"
                shares.append(RouterShare(share_name, router, spec, spec.weight / len(names)))
        return shares

    def _shares_of_rows(self, adapter_names: list[str]) -> tuple[list[RouterShare], torch.Tensor]:
        """Shares `[B]` that give each row of the batch the adapter that it names, and those of the own angle."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        shares = []
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([float(row == name) for row in adapter_names], device="cpu")
            for share in self._shares_of([name]):
                share.weight = share.weight * rows
                shares.append(share)
        others = [float(row not in self.moice_router) for row in adapter_names]
        return shares, torch.tensor(others, device="cpu")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Build the routers of `adapter_names` (default: the active ones) into the attention module.

        Adapters merged one after the other count like adapters that are active together: their mixtures are averaged.

        Raises:
            ValueError: with `safe_merge`, a router holds values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moice_router]
        if not names:
            return
        if safe_merge:
            for name in names:
                if not all(parameter.isfinite().all() for parameter in self.moice_router[name].parameters()):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its router "
                        "holds values that are not finite, so it was not merged. Train it again with a lower learning "
                        "rate, or load an earlier checkpoint."
                    )
        names = [*self.merged_adapters, *names]
        self.unmerge()
        self.merged_adapters.extend(names)
        shares, by_position = self._shares_of(self.merged_adapters), self._by_position_of(self.merged_adapters)
        build_in(self.base_layer, self.rope, self.num_heads, self.head_dim, shares, by_position)

    def unmerge(self) -> None:
        """Take merged routers out of the attention module, which is then what it was before."""
        if self.merged:
            getattr(self.base_layer, ROUTERS_NAME).remove(self.base_layer)
            self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The attention module without this wrapper: with its routers built in, or as it was. Called by PEFT."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        if not self.merged:
            restore(self.base_layer)
        return self.base_layer

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # An attention module has no weight of its own; PEFT's version would leave the routers where they were made.
        parameters = list(base_layer.parameters())
        weight = next((p for p in parameters if p.is_floating_point()), None)
        # Offloaded weights lie elsewhere, or nowhere, until a hook of accelerate's brings them.
        hooks = [getattr(module, "_hf_hook", None) for module in base_layer.modules()]
        devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
        devices += [parameter.device for parameter in parameters]
        return (torch.device(devices[0]) if devices else None), (None if weight is None else weight.dtype)

    def __getattr__(self, name: str) -> Any:
        # Decoder layers read attributes of their attention module.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_base_layer(name):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_base_layer(name):
            delattr(self.base_layer, name)
        else:
            super().__delattr__(name)

    def _is_of_base_layer(self, name: str) -> bool:
        """Whether an attribute is the attention module's and not the wrapper's, as for reading it."""
        # `nn.DataParallel` sets `__dict__` itself, before there is anything else.
        if name.startswith("_") or hasattr(type(self), name):
            return False
        if name in vars(self) or name in self._modules or name in self._parameters or name in self._buffers:
            return False
        base_layer = self._modules.get("base_layer")
        return base_layer is not None and hasattr(base_layer, name)

    def __repr__(self) -> str:
        return "moice." + super().__repr__()
