"""Combining adapters into one: the config and the router weights of `add_weighted_adapter`."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft.utils import merge_utils

from ..rope.rules import Base, in_json, order_of
from ..routing.spec import Bases, RouterSpec
from .config import MoICEConfig
from .layer import MoICELayer

PRUNING_TYPES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Names of functions of PEFT, in `merge_utils`."""
COMBINATION_TYPES = ("cat", "linear", *PRUNING_TYPES)

# What has to agree between adapters whose router weights are combined.
_SHAPE_FIELDS = ("rope_bases", "top_k", "router_dim", "router_scope", "hidden_act", "identity")
_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclasses.dataclass
class Combination:
    """Which adapters are combined, and how, as [`MoICEModel.add_weighted_adapter`] is told."""

    adapters: list[str]
    weights: list[float]
    combination_type: str
    density: float | None
    majority_sign_method: Literal["total", "frequency"]


def combined_config(combination: Combination, configs: list[MoICEConfig]) -> MoICEConfig:
    """The config of an adapter that combines those that have `configs`.

    Raises:
        ValueError: weights, density or adapters that do not fit the combination type.
    """
    adapters, weights = combination.adapters, combination.weights
    combination_type, density = combination.combination_type, combination.density
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"`combination_type` is {combination_type!r}; choose one of {list(COMBINATION_TYPES)}.")
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights; give one weight per adapter.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` are {weights}; they have to be finite.")
    if combination_type in PRUNING_TYPES and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"`density` is {density}, but {combination_type!r} needs the share of values to keep, in (0, 1]."
        )
    for name, member in zip(adapters, configs, strict=True):
        if member.ropes is not None:
            raise ValueError(
                f"Adapter {name!r} has ropes by position and no routers to combine. Activate it next to others with "
                "`set_adapter`."
            )
    _check_same_modules(adapters, configs)
    config = copy.deepcopy(configs[0])
    config.task_type = _common(configs, "task_type")
    if combination_type == "cat":
        if min(weights) <= 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"`weights` are {weights}; 'cat' mixes adapters in these shares, so they have to be positive and sum "
                "to one. Divide them by their sum, or choose combination_type='linear'."
            )
        _fill_mean(config, configs, weights)
        return config
    shapes = [
        [[getattr(spec, name) for name in _SHAPE_FIELDS] for spec in member.router_specs()] for member in configs
    ]
    for name, shape in zip(adapters[1:], shapes[1:], strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{combination_type!r} combines router weights one by one, but adapters {adapters[0]!r} and {name!r} "
                f"differ in one of {list(_SHAPE_FIELDS)}. Choose combination_type='cat', which keeps all routers."
            )
    return config


def _fill_mean(config: MoICEConfig, configs: list[MoICEConfig], weights: list[float]) -> None:
    """Make `config` that of the weighted mean of the adapters that have `configs`."""
    specs = [
        dataclasses.replace(spec, weight=spec.weight * weight)
        for member, weight in zip(configs, weights, strict=True)
        for spec in member.router_specs()
    ]
    forced = {spec.implementation for spec in specs} - {"auto"}
    if len(forced) > 1:
        raise ValueError(
            f"The adapters force different implementations {sorted(forced)}. Set `implementation` to the same value, "
            "or to 'auto', in their configs."
        )
    config.members = [dataclasses.asdict(spec) for spec in specs]
    config.implementation = forced.pop() if forced else "auto"
    config.rope_bases = _all_bases(specs)
    config.top_k = min(sum(spec.top_k for spec in specs), config.num_experts)
    for name in ("router_dim", "router_scope", "hidden_act", "router_aux_loss_coef"):
        setattr(config, name, _common(specs, name))
    config.init_weights = "identity" if all(spec.identity for spec in specs) else True


def _all_bases(specs: list[RouterSpec]) -> Bases:
    """The distinct experts of all routers, in an order that does not depend on theirs, the model's own first."""
    layer_types = {kind for spec in specs if isinstance(spec.rope_bases, dict) for kind in spec.rope_bases}

    def union(layer_type: str | None) -> list[Base]:
        lists = [spec.bases_of(layer_type) for spec in specs]
        own = {bases[0] for bases in lists if len(bases) > 1}
        experts = sorted({b for bases in lists for b in bases}, key=lambda base: (base not in own, order_of(base)))
        return [in_json(expert) if isinstance(expert, tuple) else expert for expert in experts]

    return {layer_type: union(layer_type) for layer_type in sorted(layer_types)} if layer_types else union(None)


def _common(items: list[MoICEConfig] | list[RouterSpec], name: str) -> Any:
    """The attribute that all items share, or None if they differ."""
    values = [getattr(item, name) for item in items]
    return values[0] if all(value == values[0] for value in values) else None


def _check_same_modules(adapters: list[str], configs: list[MoICEConfig]) -> None:
    for name, config in zip(adapters, configs, strict=True):
        if any(getattr(config, field) != getattr(configs[0], field) for field in _TARGET_FIELDS):
            raise ValueError(
                f"Adapters {adapters[0]!r} and {name!r} adapt different modules ({configs[0].target_modules} and "
                f"{config.target_modules}). Combine adapters over the same modules, or activate both with "
                "`set_adapter`."
            )
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} has trained more than its routers (`modules_to_save` or "
                "`trainable_token_indices`), which cannot be combined. Combine adapters of routers alone, or activate "
                "the adapters together with `set_adapter`."
            )


@torch.no_grad()
def combine_routers(layer: MoICELayer, adapter_name: str, combination: Combination) -> None:
    """Fill the routers of `adapter_name` in one layer from those of the adapters that are combined."""
    sources = [layer.routers(name) for name in combination.adapters]
    # PEFT keeps trained adapters in float32 over a base of half precision, but gives new ones its dtype.
    dtypes = [router.gate_proj.dtype for routers in sources for router in routers]
    layer.moice_router[adapter_name].to(functools.reduce(torch.promote_types, dtypes))
    targets = layer.routers(adapter_name)
    if combination.combination_type == "cat":
        for target, source in zip(targets, (router for routers in sources for router in routers), strict=True):
            target.load_state_dict(source.state_dict())
        return
    for target, *routers in zip(targets, *sources, strict=True):
        for name, parameter in target.named_parameters():
            tensors = [router.get_parameter(name) for router in routers]
            shares = torch.tensor(combination.weights, device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(_combine(tensors, shares, combination))


def _combine(tensors: list[torch.Tensor], shares: torch.Tensor, combination: Combination) -> torch.Tensor:
    kind = combination.combination_type
    if kind == "linear":
        return merge_utils.task_arithmetic(tensors, shares)
    merge: Callable[..., torch.Tensor] = getattr(merge_utils, kind)
    options = [combination.majority_sign_method] if kind in ("ties", "dare_ties") else []
    return merge(tensors, shares, combination.density, *options)
