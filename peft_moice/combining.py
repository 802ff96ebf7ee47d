"""Combining adapters into one: the config and the router weights of `add_weighted_adapter`."""

import copy
import dataclasses
import math

import torch
from peft.utils import merge_utils

from .config import MoICEConfig
from .layer import MoICELayer

PRUNING_TYPES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = ("cat", "linear", *PRUNING_TYPES)

# What has to agree between adapters whose router weights are combined.
_SHAPE_FIELDS = ("rope_bases", "top_k", "router_dim", "router_scope", "hidden_act", "identity")


def combined_config(
    adapters: list[str],
    configs: list[MoICEConfig],
    weights: list[float],
    combination_type: str,
    density: float | None,
) -> MoICEConfig:
    """The config of an adapter that combines `adapters`.

    Raises:
        ValueError: weights, density or adapters that do not fit the combination type.
    """
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
    first = configs[0]
    config = copy.deepcopy(first)
    config.target_modules = _common_targets(adapters, configs)
    if combination_type == "cat":
        if min(weights) <= 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"`weights` are {weights}; 'cat' mixes adapters in these shares, so they have to be positive and sum "
                "to one. Divide them by their sum, or choose combination_type='linear'."
            )
        config.members = [
            dataclasses.asdict(dataclasses.replace(spec, weight=spec.weight * weight))
            for member, weight in zip(configs, weights, strict=True)
            for spec in member.router_specs()
        ]
        if all(isinstance(member.rope_bases, list) for member in configs):
            config.rope_bases = list(dict.fromkeys(base for member in configs for base in member.rope_bases))
        config.top_k = min(sum(member.top_k for member in configs), config.num_experts)
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


def _common_targets(adapters: list[str], configs: list[MoICEConfig]) -> set[str] | str | None:
    targets = configs[0].target_modules
    for name, config in zip(adapters[1:], configs[1:], strict=True):
        same_layers = config.layers_to_transform == configs[0].layers_to_transform
        if config.target_modules != targets or not same_layers:
            raise ValueError(
                f"Adapters {adapters[0]!r} and {name!r} adapt different modules ({targets} and "
                f"{config.target_modules}). Combine adapters over the same modules, or activate both with "
                "`set_adapter`."
            )
    return targets


@torch.no_grad()
def combine_routers(
    layer: MoICELayer,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Fill the routers of `adapter_name` in one layer from those of `adapters`."""
    sources = [layer.routers(name) for name in adapters]
    targets = layer.routers(adapter_name)
    if combination_type == "cat":
        for target, source in zip(targets, (router for routers in sources for router in routers), strict=True):
            target.load_state_dict(source.state_dict())
        return
    for target, *routers in zip(targets, *sources, strict=True):
        for name, parameter in target.named_parameters():
            tensors = [router.get_parameter(name) for router in routers]
            share = torch.tensor(weights, device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(_combine(tensors, share, combination_type, density, majority_sign_method))


def _combine(
    tensors: list[torch.Tensor], weights: torch.Tensor, combination_type: str, density: float | None, sign: str
) -> torch.Tensor:
    if combination_type == "linear":
        return merge_utils.task_arithmetic(tensors, weights)
    if combination_type == "ties":
        return merge_utils.ties(tensors, weights, density, sign)
    if combination_type == "dare_ties":
        return merge_utils.dare_ties(tensors, weights, density, sign)
    if combination_type == "dare_linear":
        return merge_utils.dare_linear(tensors, weights, density)
    return merge_utils.magnitude_prune(tensors, weights, density)
