"""Whether stored routers fit the model and the config they are loaded into."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .layer import MoICELayer

_PEFT_PREFIX = "base_model.model."
_FSDP_PREFIX = "_fsdp_wrapped_module."


def check_stored_routers(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Raise unless `state_dict` holds exactly the routers of `adapter_name`, in the shapes that the config asks for.

    PEFT drops surplus weights in silence and leaves routers without stored weights at their random start. The names in
    `state_dict` are those of `model`, in which the adapter is in place.

    Raises:
        ValueError: weights are missing, nobody's, not finite, or of another shape or kind; names the first, the reason
            and the way out.
    """
    routers = _router_parameters(model, adapter_name)
    missing = [key for key in routers if key not in state_dict]
    if missing:
        raise ValueError(
            f"The stored adapter lacks {len(missing)} of {len(routers)} router weights, the first is {missing[0]!r}. "
            "It was written for fewer layers, or with another config: load it onto the base model that its "
            "adapter_config.json names, with the adapter_config.json it was saved with."
        )
    known = {_plain(key) for key, _ in model.named_parameters(remove_duplicate=False)}
    known |= {_plain(key) for key, _ in model.named_buffers(remove_duplicate=False)}
    surplus = [key for key in state_dict if _plain(key) not in known]
    if surplus:
        raise ValueError(
            f"The stored adapter holds {len(surplus)} weights that this model has no place for, the first is "
            f"{surplus[0]!r}. It was written for more layers, or with another config: load it onto the base model "
            "that its adapter_config.json names, with the adapter_config.json it was saved with."
        )
    for key in routers:
        weight = state_dict[key]
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise ValueError(
                f"{key!r} is stored as {weight.dtype}, which routers are not trained in. The file is damaged, or was "
                "converted: store them in float32, bfloat16 or float16."
            )
        # In float32, as they are used: a large float64 is infinite there.
        if not weight.is_meta and not bool(weight.float().isfinite().all()):
            raise ValueError(
                f"{key!r} holds values that are not finite. The file is damaged, or training has failed: get it anew, "
                "or load an earlier checkpoint."
            )
    for key, parameter in routers.items():
        # Partitioned parameters (ZeRO-3) are empty outside of a gathering context.
        if parameter.numel() and parameter.shape != state_dict[key].shape:
            raise ValueError(_shape_message(key, tuple(state_dict[key].shape), tuple(parameter.shape)))


def discard_if_never_loaded(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that loading has put in place, and whose stored weights were refused, from a `PeftModel`.

    An adapter that may have been trained is left alone: one that has been loaded before, or whose routers are not
    frozen.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    frozen = not any(parameter.requires_grad for parameter in _router_parameters(model, adapter_name).values())
    if not isinstance(model, PeftModel) or not getattr(config, "awaits_weights", False) or not frozen:
        return
    if len(model.peft_config) == 1:
        tuner: Any = model.base_model
        tuner.unload()
    else:
        model.delete_adapter(adapter_name)


def _router_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    return {
        f"{name}.moice_router.{adapter_name}.{parameter_name}".replace(_FSDP_PREFIX, ""): parameter
        for name, layer in model.named_modules()
        if isinstance(layer, MoICELayer) and adapter_name in layer.moice_router
        for parameter_name, parameter in layer.moice_router[adapter_name].named_parameters()
    }


def _plain(key: str) -> str:
    return key.replace(_FSDP_PREFIX, "").removeprefix(_PEFT_PREFIX)


def _shape_message(key: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    where = f"{key!r} is stored with shape {stored}, but its config and this model ask for {expected}"
    if len(stored) != len(expected):
        reason = "one has a router per layer, the other per head. Correct `router_scope`"
    elif len(expected) != 2 and stored[0] != expected[0]:
        reason = f"it was trained for {stored[0]} query heads, this model has {expected[0]}. Load it onto its own base"
    elif key.endswith("down_proj") and stored[-2] != expected[-2]:
        reason = (
            f"it scores {stored[-2]} angles, the config names {expected[-2]}. Correct `rope_bases` in "
            "adapter_config.json to the angles it was trained with"
        )
    elif not key.endswith("down_proj") and stored[-1] != expected[-1]:
        reason = (
            f"it reads query vectors of size {stored[-1]}, those of this model have {expected[-1]}. Load it onto the "
            "base model it was trained on"
        )
    else:
        reason = "the hidden sizes of the routers differ. Correct `router_dim` in adapter_config.json"
    return f"{where}: {reason}."
