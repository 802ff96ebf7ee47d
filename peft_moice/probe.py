"""Finds attention modules and learns, by running them on a few tokens, how their rotary embedding acts.

A layer is run twice, under the model's own base angle and under another, up to its call of the attention function.
Equal queries and keys mean that the layer has no rotary embedding; queries and keys that differ by exactly the rotation
predicted from the inverse frequencies tell the layout; anything else cannot be supported. No list of model families is
needed.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .attention.interface import intercept, restore, uses_attention_interface
from .rope import LayerRope, RotaryLayout, inverse_frequencies, rope_parameters, rotary_with_theta, rotate

_THETA_FACTOR = 4.0
_POSITIONS = (0, 1, 3, 8, 20, 50)
_RUNTIME_ROPE_TYPES = ("dynamic", "longrope")


class UnsupportedLayerError(ValueError):
    """An attention layer whose position encoding cannot be turned to other base angles."""


@dataclass
class LayerPlan:
    """What the probe learned about one attention module.

    Attributes:
        rope: the layer's rotary embedding, or None if the layer has none.
        num_heads: H, number of query heads.
        head_dim: D, size of a query vector.
    """

    rope: LayerRope | None
    num_heads: int
    head_dim: int


class _QueryKeyCapture(Exception):
    """Stands in for a mixture, and leaves the forward pass with the queries and keys it was given."""

    def attend(self, attend, query, key, value, attention_mask, **kwargs):
        self.query, self.key = query, key
        raise self


def attention_module_names(model: nn.Module) -> list[str]:
    """Names, within `model`, of the decoder's attention modules that go through transformers' attention interface.

    Encoders of other modalities are left out by asking the model for its decoder.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    return [
        name for name, module in model.named_modules() if id(module) in inside and uses_attention_interface(module)
    ]


def find_rotary(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The rotary embedding nearest to the module called `name`, inside it or beside one of its ancestors.

    Returns the module that holds it and the attribute's name, or None.
    """
    module = model.get_submodule(name)
    for holder in module.modules():
        for attribute, child in holder.named_children():
            if _is_rotary(child):
                return holder, attribute
    while name:
        name = name.rpartition(".")[0]
        holder = model.get_submodule(name)
        for attribute, child in holder.named_children():
            if _is_rotary(child):
                return holder, attribute
    return None


def _is_rotary(module: nn.Module) -> bool:
    has_frequencies = any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    return has_frequencies and hasattr(module, "config")


def plan_layer(model: nn.Module, name: str, ropes: dict | None = None) -> LayerPlan:
    """Probe the attention module called `name`.

    Args:
        model: the model that holds it.
        name: name of an attention module in `model`.
        ropes: rotary embeddings of layers probed before, shared with this one where they are equal. Filled.

    Raises:
        UnsupportedLayerError: the layer's position encoding cannot be turned to other base angles; names the layer,
            the reason and the way out.
    """
    ropes = {} if ropes is None else ropes
    module = model.get_submodule(name)

    def refuse(reason: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"MoICE cannot be applied to the attention module {name!r} ({type(module).__name__}): {reason}. "
            "Leave it out with `exclude_modules`, or name the modules to adapt with `target_modules`."
        )

    if not uses_attention_interface(module):
        raise refuse("its forward does not go through transformers' attention interface")
    found = find_rotary(model, name)
    if found is None:
        raise refuse("no rotary embedding was found in it or above it")
    holder, attribute = found
    rotary = getattr(holder, attribute)
    layer_type = _layer_type(module, rotary)
    parameters = rope_parameters(rotary.config, layer_type)
    if parameters is None:
        raise refuse(f"the model's config has no rope parameters for layers of type {layer_type!r}")
    if parameters.get("rope_type", "default") in _RUNTIME_ROPE_TYPES:
        raise refuse(
            f"its rope type {parameters['rope_type']!r} changes the angles with the sequence length, while keys in the "
            "cache keep the old ones"
        )
    if "mrope_section" in parameters:
        raise refuse("its positions have three dimensions (mRoPE)")

    own_theta = float(parameters["rope_theta"])
    other_theta = own_theta * _THETA_FACTOR
    build = (type(rotary), rotary.config, layer_type)
    own_frequencies, own_scaling = inverse_frequencies(*build, own_theta)
    frequencies, scaling = inverse_frequencies(*build, other_theta)
    if scaling != own_scaling:
        raise refuse("its attention scaling depends on rope_theta")

    with _on_real_weights(module) as runnable:
        try:
            query, key = _capture(runnable, holder, attribute, rotary, layer_type)
            other_rotary = rotary_with_theta(*build, other_theta)
            turned_query, turned_key = _capture(runnable, holder, attribute, other_rotary, layer_type)
        except UnsupportedLayerError as error:
            raise refuse(str(error)) from error

    plan = LayerPlan(None, num_heads=query.shape[1], head_dim=query.shape[-1])
    if torch.equal(query, turned_query) and torch.equal(key, turned_key):
        return plan

    deltas = frequencies - own_frequencies
    for layout in _layouts(size=2 * deltas.numel(), head_dim=plan.head_dim):
        if _explains(deltas, layout, query, turned_query) and _explains(deltas, layout, key, turned_key):
            rope_key = (id(rotary), layer_type, layout)
            plan.rope = ropes.setdefault(rope_key, LayerRope(*build, layout))
            return plan
    raise refuse(
        "its queries and keys under another rope_theta are not a rotation of those under its own, so something other "
        "than a rotation acts on them after the rotary embedding"
    )


def _layer_type(module: nn.Module, rotary: nn.Module) -> str | None:
    """The module's key into `rope_parameters` where the model has angles per layer type, else None."""
    if not isinstance(getattr(rotary, "rope_type", None), dict):
        return None
    layer_type = getattr(module, "layer_type", None)
    return layer_type if layer_type is not None else module.config.layer_types[module.layer_idx]


def _layouts(size: int, head_dim: int) -> Iterator[RotaryLayout]:
    for start in dict.fromkeys((0, head_dim - size)):
        for interleaved in (False, True):
            if start >= 0:
                yield RotaryLayout(start, size, interleaved)


def _explains(deltas: torch.Tensor, layout: RotaryLayout, own: torch.Tensor, turned: torch.Tensor) -> bool:
    positions = torch.tensor(_POSITIONS, dtype=torch.float64)
    angles = positions[:, None] * deltas
    own, turned = own.detach().cpu(), turned.detach().cpu()
    predicted = rotate(own, angles.cos().float(), angles.sin().float(), layout)
    tolerance = 32 * torch.finfo(own.dtype).eps
    return torch.allclose(predicted.float(), turned.float(), rtol=0, atol=tolerance * own.float().abs().max().item())


@contextmanager
def _on_real_weights(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself, or a copy with random weights if its own are not loaded (meta device)."""
    if not any(parameter.is_meta for parameter in module.parameters()) or hasattr(module, "_hf_hook"):
        yield module
        return
    twin = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        nn.init.normal_(parameter.data, generator=generator)
    yield twin


@torch.no_grad()
def _capture(
    module: nn.Module, holder: nn.Module, attribute: str, rotary: nn.Module, layer_type: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `[1, H, 6, D]` and keys that `module` hands to its attention function under `rotary`."""
    weight = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), None)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device = device if device is not None else (weight.device if weight is not None else torch.device("cpu"))
    dtype = weight.dtype if weight is not None else torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, len(_POSITIONS), module.config.hidden_size, generator=generator).to(device, dtype)
    position_ids = torch.tensor([_POSITIONS], device=device)

    own_rotary = getattr(holder, attribute)
    parameters = inspect.signature(type(module).forward).parameters
    arguments = {"attention_mask": None, "position_ids": position_ids}
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    if "position_embeddings" in parameters:
        rotary = rotary.to(device)
        options = {} if layer_type is None else {"layer_type": layer_type}
        arguments["position_embeddings"] = rotary(hidden_states, position_ids, **options)

    capture = _QueryKeyCapture()
    intercept(module)
    setattr(holder, attribute, rotary.to(device))
    try:
        module(hidden_states, moice=capture, **arguments)
    except _QueryKeyCapture:
        return capture.query, capture.key
    except Exception as error:
        raise UnsupportedLayerError(f"it could not be run on its own ({type(error).__name__}: {error})") from error
    finally:
        setattr(holder, attribute, own_rotary)
        restore(module)
        if hasattr(module, "_hf_hook"):
            module._hf_hook.post_forward(module, ())
    raise UnsupportedLayerError("its attention function did not receive the keyword arguments of its forward")
