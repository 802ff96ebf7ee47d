"""The inverse frequencies of a rope type under a base angle, computed by the model's own rotary embedding class."""

import copy
from typing import Any

import torch
from torch import nn


def rope_parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    """The rope parameters that hold for `layer_type` (None where a model has one set for all layers)."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def original_length(config: Any, layer_type: str | None) -> int | None:
    """The number of tokens up to which the angles of a rope type that changes them at run time stay as they are.

    None for rope types whose angles never change.
    """
    parameters = rope_parameters(config, layer_type)
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if "dynamic" in rope_type else None


def rotary_with_theta(rotary: type[nn.Module], config: Any, layer_type: str | None, rope_theta: float) -> nn.Module:
    """A rotary embedding of the same kind, built on the CPU with another `rope_theta` and nothing else changed."""
    config = copy.deepcopy(config)
    rope_parameters(config, layer_type)["rope_theta"] = rope_theta
    with torch.device("cpu"):
        return rotary(config)


@torch.no_grad()
def inverse_frequencies(
    rotary: type[nn.Module], config: Any, layer_type: str | None, rope_theta: float, is_long: bool = False
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[P]` in float64 and the attention scaling of the model's rope type under `rope_theta`.

    With `is_long`, those that it changes to beyond the original length.
    """
    module = rotary_with_theta(rotary, config, layer_type, rope_theta)
    if is_long:
        options = {} if layer_type is None else {"layer_type": layer_type}
        with torch.device("cpu"):
            module(torch.zeros(1, 1, 1), torch.tensor([[original_length(config, layer_type)]]), **options)
    prefix = "" if layer_type is None else f"{layer_type}_"
    scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
    return getattr(module, f"{prefix}inv_freq").double(), float(scaling)
