"""The inverse frequencies of a layer under other rope parameters, by the model's own rotary embedding class."""

import copy
from collections.abc import Mapping
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


_OF_ANY_TYPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Rope parameters that a rope of another type keeps."""


def merged_parameters(config: Any, layer_type: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own rope parameters with others in their place.

    Another `rope_type` takes nothing of the own one's but its base angle. Where a type needs the length that the model
    was trained for, it is the own one's, else `max_position_embeddings`.
    """
    own = rope_parameters(config, layer_type)
    length = own.get("original_max_position_embeddings") or config.max_position_embeddings
    is_other = parameters.get("rope_type", own.get("rope_type")) != own.get("rope_type")
    kept = {name: value for name, value in own.items() if not is_other or name in _OF_ANY_TYPE}
    merged = {**kept, **{name: list(v) if isinstance(v, tuple) else v for name, v in parameters.items()}}
    if merged.get("rope_type") in ("yarn", "llama3", "longrope"):
        merged.setdefault("original_max_position_embeddings", length)
    return merged


@torch.no_grad()
def frequencies_under(
    rotary: type[nn.Module], config: Any, layer_type: str | None, parameters: Mapping[str, Any], first: int = 0
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[P]` in float64 and the attention scaling with `parameters` in place of the model's own.

    Those of longrope are its long ones for queries whose positions begin at `first` behind its original length.

    Raises:
        ValueError: transformers cannot make a rope of them.
    """
    config = copy.deepcopy(config)
    merged = merged_parameters(config, layer_type, parameters)
    own = rope_parameters(config, layer_type)
    own.clear()
    own.update(merged)
    try:
        with torch.device("cpu"):
            module = rotary(config)
            if parameters and merged.get("rope_type") == "longrope" and first > 0:
                _rotate_at(module, layer_type, first)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"transformers cannot make a rope of {merged}: {type(error).__name__} {error}. Name what the rope type "
            f"{merged.get('rope_type')!r} needs in `ropes`."
        ) from None
    return _read(module, layer_type)


def _read(module: nn.Module, layer_type: str | None) -> tuple[torch.Tensor, float]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
    return getattr(module, f"{prefix}inv_freq").double(), float(scaling)


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
        with torch.device("cpu"):
            _rotate_at(module, layer_type, original_length(config, layer_type) or 0)
    return _read(module, layer_type)


def _rotate_at(module: nn.Module, layer_type: str | None, position: int) -> None:
    """Let rope types that change at run time come to the angles that hold at `position`."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    module(torch.zeros(1, 1, 1), torch.tensor([[position]]), **options)
