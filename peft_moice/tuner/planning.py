"""What an adapter will do to a model, found out and checked before anything is replaced."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..probing import LayerPlan, LayerProbe, attention_module_names, explain_no_targets
from ..rope import LayerRope
from ..rope.frequencies import frequencies_under, merged_parameters, original_length, rope_parameters
from ..rope.rules import longest
from ..routing.spec import bases_of
from .beside_routers import check_beside_routers
from .config import MoICEConfig
from .layer import MoICELayer
from .targets import is_target

logger = logging.getLogger(__name__)


PlanOf = Callable[[str], LayerPlan]
"""How the attention module of a name is adapted, looked at when it is asked for first."""


def plan_layers(config: MoICEConfig, model: nn.Module) -> PlanOf:
    """Probe the layers that `config` targets and resolve in `config` what it leaves open.

    A module that an earlier adapter has wrapped has the plan of its wrapper.

    Raises:
        ValueError: no module matches, or one that cannot be adapted does, or angles that do not fit the model.
    """
    _check_heads_are_here(config, model)
    probe = LayerProbe(model)

    @functools.cache
    def plan_of(name: str) -> LayerPlan:
        target = model.get_submodule(name)
        if not isinstance(target, MoICELayer):
            return probe.plan(name)
        target.rope.check_config()
        return LayerPlan(target.rope, target.num_heads, target.head_dim)

    names = _targeted(config, model) if config.target_modules is not None else _choose_targets(config, model, plan_of)
    _check_layers_to_transform(config, names)
    for name in names:
        _check_not_on_disk(model, name)
    without_rope = [name for name in names if plan_of(name).rope is None]
    if without_rope:
        logger.info("MoICE leaves out %d attention modules without a rotary embedding.", len(without_rope))
    if names and len(without_rope) == len(names):
        raise ValueError(
            f"None of the targeted modules has a rotary embedding: {without_rope[:3]} ... MoICE works on models "
            "with RoPE only."
        )
    thetas: dict[str | None, float] = {}
    for name in names:
        rope = plan_of(name).rope
        if rope is not None and thetas.setdefault(rope.layer_type, rope.rope_theta) != rope.rope_theta:
            raise ValueError(
                f"{name} has rope_theta {rope.rope_theta}, other targeted layers have "
                f"{thetas[rope.layer_type]}. Adapt them as two adapters, with `target_modules`."
            )
    if thetas:
        config.resolve_bases(thetas)
    ropes = {id(rope): rope for name in names if (rope := plan_of(name).rope) is not None}
    if config.ropes is None:
        _check_ropes_of_routers(config, ropes.values())
    else:
        _check_ropes(config, ropes.values())
        _check_longrope_is_whole(names, model, plan_of)
    check_beside_routers(config, model, names)
    return plan_of


def _choose_targets(config: MoICEConfig, model: nn.Module, plan_of: PlanOf) -> list[str]:
    """Target every attention module of the decoder that has a rotary embedding, as far as the config lets it.

    Returns the names of the modules that are targeted then.
    """
    everywhere = copy.copy(config)
    # An attention module that an earlier adapter has wrapped goes by its wrapper's name.
    every = [name.removesuffix(".base_layer") for name in attention_module_names(model)]
    everywhere.target_modules = set(every)
    names = [name for name in every if is_target(everywhere, name)]
    if every and not names:
        fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        given = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
        raise ValueError(
            f"The config leaves out all of the model's attention modules ({every[0]!r} and so on): {given}. "
            "Indices of layers start at 0; leave out what excludes the modules that you want to adapt."
        )
    if config.ropes is not None:
        length = longest(config.ropes_by_position())
        sliding = {name for name in names if _slides(model.get_submodule(name), length)}
        if names and len(sliding) == len(names):
            raise ValueError(
                "Every attention module of the model sees a sliding window of keys, which longer texts do not make "
                "longer, so `ropes` have no layer to extend. To change their ropes all the same, name them with "
                "`target_modules`."
            )
        names = [name for name in names if name not in sliding]
    lacks = {plan_of(name).lacks for name in names}
    names = [name for name in names if plan_of(name).rope is not None]
    if not names:
        raise ValueError(explain_no_targets(model, lacks))
    everywhere.target_modules = {name.rpartition(".")[2] for name in names}
    if _targeted(everywhere, model) == names:
        config.target_modules = everywhere.target_modules
        return names
    config.target_modules = set(names)
    return _targeted(config, model)


def _slides(attention: nn.Module, length: int | None) -> bool:
    """Whether an attention module sees a sliding window of keys, which texts of up to `length` do not make longer."""
    config: Any = attention.config
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds is not None and isinstance(index, int) and index < len(kinds):
        return bool(kinds[index] == "sliding_attention")
    window = getattr(config, "sliding_window", None)
    # That of some models (Phi) is longer than their texts.
    reached = config.max_position_embeddings if length is None else length
    return window is not None and window < reached and getattr(config, "use_sliding_window", True)


def _check_ropes_of_routers(config: MoICEConfig, ropes: Iterable[LayerRope]) -> None:
    """Raise a ValueError if the layers' rotary embeddings cannot have the ropes that routers choose among."""
    for rope in ropes:
        assert config.rope_bases is not None  # resolved
        for rule in bases_of(config.rope_bases, rope.layer_type):
            if not isinstance(rule, dict):
                continue
            if original_length(rope.config, rope.layer_type) is not None:
                kind = rope_parameters(rope.config, rope.layer_type)["rope_type"]
                raise ValueError(
                    f"The model's own rope type {kind!r} changes its angles with the length of the text, so {rule} "
                    "has nothing to start from. Let routers choose among base angles alone (`rope_bases`, "
                    "`base_multipliers`), or load the model with a rope type with fixed angles."
                )
            frequencies_under(rope.rotary, rope.config, rope.layer_type, rule)
            _note_length(rule, rope)


def _note_length(rule: dict[str, Any], rope: LayerRope) -> None:
    """Name in a rule the length that its rope is made from: merging states a new one in the model's config."""
    merged = merged_parameters(rope.config, rope.layer_type, rule)
    if "rope_type" in rule and "original_max_position_embeddings" in merged:
        rule["original_max_position_embeddings"] = merged["original_max_position_embeddings"]


def _check_ropes(config: MoICEConfig, ropes: Iterable[LayerRope]) -> None:
    """Raise a ValueError if the layers' rotary embeddings cannot have the config's ropes."""
    for rope in ropes:
        own: Any = rope.config
        if rope.original_length is not None:
            _check_over_longrope(config, rope.original_length)
        elif original_length(own, rope.layer_type) is not None:
            kind = rope_parameters(own, rope.layer_type)["rope_type"]
            raise ValueError(
                f"The model's own rope type {kind!r} changes its angles with the length of the text, while keys in a "
                "cache keep the old ones, so `ropes` have nothing to start from. Load the model with a rope type with "
                "fixed angles, such as 'yarn' or 'linear'."
            )
        for expert in config.ropes_by_position():
            if expert.far is not None and expert.start > own.max_position_embeddings:
                raise ValueError(
                    f"`ropes` keep the model's own angles for keys up to {expert.start} tokens away, but the model "
                    f"was trained for {own.max_position_embeddings}. Let `distances` be cut below that."
                )
            for parameters in (expert.near, expert.far or ()):
                frequencies_under(rope.rotary, own, rope.layer_type, dict(parameters), expert.first)
        for rule in config.ropes or ():
            _note_length(rule, rope)


def _check_over_longrope(config: MoICEConfig, length: int) -> None:
    """Raise a ValueError if a rule goes on with the short factors of a model of rope type longrope beyond `length`."""
    for expert in config.ropes_by_position():
        is_long = dict(expert.near).get("rope_type") not in (None, "longrope") or expert.first >= length
        if (expert.end is None or expert.end > length) and not (expert.near and is_long):
            raise ValueError(
                f"The model's own rope is 'longrope', whose short factors hold for its first {length} tokens, and "
                f"`ropes` go on with them: {expert.in_words()}. Let a range of `query_positions` end at {length}, and "
                "name {'rope_type': 'longrope'} in the next, for its long factors, as `extend` does."
            )


def _check_longrope_is_whole(names: list[str], model: nn.Module, plan_of: PlanOf) -> None:
    """Raise a ValueError if layers without `ropes` would be left with the short factors of longrope."""
    if any((rope := plan_of(name).rope) and rope.original_length is not None for name in names):
        for name in attention_module_names(model):
            rope = plan_of(name.removesuffix(".base_layer")).rope
            if name.removesuffix(".base_layer") not in names and rope and rope.original_length is not None:
                raise ValueError(
                    f"`ropes` leave out {name}, but keep the rotary embedding that it shares at the short factors of "
                    "'longrope'. Leave out `target_modules`, `layers_to_transform` and `exclude_modules`."
                )


def _targeted(config: MoICEConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `config` targets, those inside of wrapped attention modules left out."""
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if name and "base_layer" not in name.split(".") and is_target(config, name)]


def _check_layers_to_transform(config: MoICEConfig, names: list[str]) -> None:
    """Raise if an index matches none of the targeted modules `names` while others do."""
    if not names:
        return  # PEFT raises where nothing matches at all.
    one_layer = copy.copy(config)
    indices = config.layers_to_transform
    for index in [indices] if isinstance(indices, int) else indices or ():
        one_layer.layers_to_transform = [index]
        if not any(is_target(one_layer, name) for name in names):
            raise ValueError(
                f"`layers_to_transform` names layer {index}, but no targeted module lies in one of that index. "
                "Indices start at 0; leave out those that the model does not have, and layers without a rotary "
                "embedding."
            )


def _check_heads_are_here(config: MoICEConfig, model: nn.Module) -> None:
    """Raise a ValueError if the adapter has weights per head, but tensor parallelism has spread the heads."""
    parts = config.members or [{"router_scope": config.router_scope, "identity": config.init_weights == "identity"}]
    if (getattr(model, "tp_size", None) or 1) > 1 and any(
        part["router_scope"] == "head" or part["identity"] for part in parts
    ):
        raise ValueError(
            "The adapter has weights per head (router_scope='head' or init_weights='identity'), but the model was "
            "loaded with tensor parallelism, where every process holds a part of the heads. Load it without "
            "`tp_plan`, or use an adapter with router_scope='layer' and init_weights=True."
        )


def _check_not_on_disk(model: nn.Module, name: str) -> None:
    """Raise if the weights of the module called `name` are offloaded to disk.

    PEFT looks offloaded weights up under names that hold for adapters of linear layers only, and transformers' loader
    leaves the adapter of a layer that is on disk at its random start.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = any(
        device == "disk" and (not key or f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}."))
        for key, device in device_map.items()
    )
    if on_disk and any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
        raise ValueError(
            f"The weights of {name!r} are offloaded to disk, where an adapter cannot be loaded. Keep the attention "
            "modules in memory with another `device_map`, or merge the adapter on a machine with more memory "
            "(`merge_and_unload().save_pretrained(...)`) and offload the result."
        )
