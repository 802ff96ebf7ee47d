"""Finds attention modules and learns, by running them on a few tokens, how their rotary embedding acts.

A layer is run twice, under the model's own base angle and under another, up to its call of the attention function.
Equal queries and keys mean that the layer has no rotary embedding; queries and keys that differ by exactly the
rotation predicted from the inverse frequencies tell the layout; anything else cannot be supported. Where the rope type
changes its angles with the length (longrope), both sets are tried. No list of model families is needed.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention.interface import intercept, restore, uses_attention_interface
from .rope import LayerRope, RotaryLayout, rotate
from .rope.layer_rope import inverse_frequencies, original_length, rope_parameters, rotary_with_theta

_THETA_FACTOR = 4.0
_POSITIONS = (0, 1, 3, 8, 20, 50)
_IMPLEMENTATION_NAMES = {"eager", "sdpa", "flex_attention", "flash_attention_2"}


class UnsupportedLayerError(ValueError):
    """An attention layer whose position encoding cannot be turned to other base angles."""


@dataclass
class LayerPlan:
    """What the probe learned about one attention module.

    Attributes:
        rope: the layer's rotary embedding, or None if the layer has none.
        num_heads: H, number of query heads; 0 if the layer has no rotary embedding.
        head_dim: D, size of a query vector; likewise.
    """

    rope: LayerRope | None
    num_heads: int = 0
    head_dim: int = 0


@dataclass
class FoundRotary:
    """A rotary embedding of the model and where it hangs."""

    holder: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.holder, self.attribute)


class _QueryKeyCapture(Exception):
    """Stands in for a mixture, and leaves the forward pass with the queries and keys it was given."""

    def attend(self, attend, query, key, value, attention_mask, **kwargs):
        self.query, self.key, self.kwargs = query, key, kwargs
        raise self


def attention_module_names(model: nn.Module) -> list[str]:
    """Names, within `model`, of the decoder's attention modules that go through transformers' attention interface.

    Encoders of other modalities are left out by asking the model for its decoder.
    """
    decoder = _decoder_of(model)
    inside = {id(module) for module in decoder.modules()}
    return [
        name for name, module in model.named_modules() if id(module) in inside and uses_attention_interface(module)
    ]


def _decoder_of(model: nn.Module) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Where a model calls something else its decoder (ModernBERT: the head), all of it is searched.
    return decoder if any(map(uses_attention_interface, decoder.modules())) else model


def explain_no_targets(model: nn.Module) -> str:
    """Why no attention module of `model` can be adapted, and what the user can do."""
    outside = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if "Attention" in type(module).__name__ and not uses_attention_interface(module)
        }
    )
    if attention_module_names(model):
        reason = "none of its attention modules has a rotary embedding"
    elif outside:
        reason = f"its attention modules ({', '.join(outside)}) do not go through transformers' attention interface"
    else:
        reason = "it has no attention modules that go through transformers' attention interface"
    return (
        f"MoICE cannot be applied to {type(model).__name__}: {reason}. It works on RoPE models of transformers; if "
        "this is one, name its attention modules with `target_modules`."
    )


class LayerProbe:
    """Probes the attention modules of one model.

    Args:
        model: the model that holds them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._ropes: dict[tuple, LayerRope] = {}
        # Some families hand keys and values from layer to layer; one such hand-over per angle and set of positions.
        self._shared_keys: dict[tuple, dict] = {}
        self._observed: dict[nn.Module, Any] | None = None
        # Whether attention modules of a class run without position embeddings too.
        self._optional: dict[type[nn.Module], bool] = {}

    def plan(self, name: str) -> LayerPlan:
        """Probe the attention module called `name`. Layers with equal rotary embeddings share one [`LayerRope`].

        Raises:
            UnsupportedLayerError: the layer's position encoding cannot be turned to other base angles; names the
                layer, the reason and the way out.
        """
        try:
            return self._plan(name)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"MoICE cannot be applied to the attention module {name!r} "
                f"({type(self.model.get_submodule(name)).__name__}): {error}. Leave it out with `exclude_modules`, or "
                "name the modules to adapt with `target_modules`."
            ) from error.__cause__

    def _plan(self, name: str) -> LayerPlan:
        module = self.model.get_submodule(name)
        if not uses_attention_interface(module):
            raise UnsupportedLayerError("its forward does not go through transformers' attention interface")
        if getattr(module, "is_cross_attention", False):
            return LayerPlan(rope=None)
        found = self.find_rotary(name)
        if found is None or self._is_called_without(module, found):
            return LayerPlan(rope=None)
        rotary = found.module
        layer_type = _layer_type(module, rotary)
        parameters = rope_parameters(rotary.config, layer_type)
        if parameters is None:
            return LayerPlan(rope=None)

        own_theta = float(parameters["rope_theta"])
        other_theta = own_theta * _THETA_FACTOR
        build = (type(rotary), rotary.config, layer_type)
        own_frequencies, own_scaling = inverse_frequencies(*build, own_theta)
        frequencies, scaling = inverse_frequencies(*build, other_theta)
        if scaling != own_scaling:
            raise UnsupportedLayerError("its attention scaling depends on rope_theta")

        limit = original_length(rotary.config, layer_type)
        positions = tuple(p for p in _POSITIONS if limit is None or p < limit)
        thetas = (own_theta, other_theta)
        query_and_key = self._captures(module, found, build, thetas, positions)
        query, _ = query_and_key[0]
        plan = LayerPlan(None, num_heads=query.shape[1], head_dim=query.shape[-1])
        if all(torch.equal(own, turned) for own, turned in query_and_key):
            return plan

        deltas = frequencies - own_frequencies
        for layout, direction in _layouts(size=2 * deltas.numel(), head_dim=plan.head_dim):
            if _explains(direction * deltas, layout, positions, query_and_key):
                break
        else:
            raise UnsupportedLayerError(
                "its queries and keys under another rope_theta are not a rotation of those under its own, so "
                "something other than a rotation acts on them after the rotary embedding"
            )
        switch = None
        if parameters.get("rope_type") == "longrope":
            # One more token, at a position that makes the long factors hold for all.
            query_and_key = self._captures(module, found, build, thetas, (*positions, limit))
            own_long, long = (inverse_frequencies(*build, theta, is_long=True)[0] for theta in thetas)
            if _explains(direction * (long - own_long), layout, positions, query_and_key):
                switch = limit
            elif not _explains(direction * deltas, layout, positions, query_and_key):
                raise UnsupportedLayerError(
                    f"beyond its original length of {limit} tokens, its queries and keys under another rope_theta are "
                    "turned neither by the long nor by the short factors of its rope type 'longrope'"
                )
        rope_key = (id(rotary), layer_type, layout)
        plan.rope = self._ropes.setdefault(rope_key, LayerRope(*build, layout, direction, switch))
        return plan

    def find_rotary(self, name: str, rope_theta: float | None = None) -> FoundRotary | None:
        """The rotary embedding nearest to the module called `name`: inside it, or beside one of its ancestors.

        Of several, it is the one with `rope_theta`; without that, the model is run to see.

        None if there is none, or if it cannot reach the module.
        """
        module = self.model.get_submodule(name)
        for holder in module.modules():
            for attribute, child in holder.named_children():
                if _is_rotary(child):
                    return FoundRotary(holder, attribute)
        if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
            return None
        while name:
            name = name.rpartition(".")[0]
            ancestor = self.model.get_submodule(name)
            for child in ancestor.children():
                if isinstance(child, nn.ModuleList) and len(child) > 0 and all(map(_is_rotary, child)):
                    if rope_theta is None:
                        return self._observed_rotary(module, child)
                    thetas = [rotary.config.rope_parameters["rope_theta"] for rotary in child]
                    return FoundRotary(child, str(thetas.index(rope_theta)))
            for attribute, child in ancestor.named_children():
                if _is_rotary(child):
                    return FoundRotary(ancestor, attribute)
        return None

    def _is_called_without(self, module: nn.Module, found: FoundRotary) -> bool:
        """Whether the model keeps its position embeddings from `module`, seen by running it on three tokens.

        Only modules that run without position embeddings raise the question.
        """
        if any(holder is found.holder for holder in module.modules()):
            return False
        if type(module) not in self._optional:
            try:
                with _on_real_weights(module) as runnable:
                    self._capture(runnable, found, None)
            except UnsupportedLayerError:
                self._optional[type(module)] = False
            else:
                self._optional[type(module)] = True
        return self._optional[type(module)] and self._received_embeddings(module) is None

    def _received_embeddings(self, module: nn.Module) -> Any:
        """The `position_embeddings` that `module` receives when the model runs on three tokens."""
        if self._observed is None:
            self._observed = _observe_position_embeddings(self.model)
        if module not in self._observed:
            raise UnsupportedLayerError("running the model did not tell which rotary embedding it gives to this layer")
        return self._observed[module]

    def _observed_rotary(self, module: nn.Module, rotaries: nn.ModuleList) -> FoundRotary | None:
        """Which of several rotary embeddings the model gives to `module`."""
        received = self._received_embeddings(module)
        if received is None:
            return None
        hidden_states = received[0].new_zeros(())
        position_ids = torch.arange(received[0].shape[-2], device=hidden_states.device)[None]
        for index, rotary in enumerate(rotaries):
            if torch.equal(rotary(hidden_states, position_ids)[0], received[0]):
                return FoundRotary(rotaries, str(index))
        raise UnsupportedLayerError("the model has several rotary embeddings, and it uses none of them unchanged")

    def _captures(
        self,
        module: nn.Module,
        found: FoundRotary,
        build: tuple[type[nn.Module], object, str | None],
        thetas: tuple[float, float],
        positions: tuple[int, ...],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries `[1, H, S, D]` and keys of S tokens at `positions`, each under both of `thetas`."""
        with _on_real_weights(module) as runnable:
            own, turned = (
                self._capture(runnable, found, rotary_with_theta(*build, theta), build[2], positions, theta)
                for theta in thetas
            )
        return list(zip(own, turned, strict=True))

    @torch.enable_grad()
    def _capture(
        self,
        module: nn.Module,
        found: FoundRotary,
        rotary: nn.Module | None,
        layer_type: str | None = None,
        positions: tuple[int, ...] = _POSITIONS,
        theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[1, H, S, D]` and keys that `module` hands to its attention function under `rotary`, or without.

        S tokens stand at `positions`; keys shared between layers are kept apart by `theta`.
        """
        weight = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), None)
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        device = device if device is not None else (weight.device if weight is not None else torch.device("cpu"))
        dtype = weight.dtype if weight is not None else torch.get_default_dtype()
        # Quantized layers may repack their weights for inference, for good, on an input that needs no gradient.
        hidden_states = _hidden_states(module, len(positions)).to(device, dtype).requires_grad_().clone()
        position_ids = torch.tensor([positions], device=device)
        position_embeddings = None
        if rotary is not None:
            rotary = rotary.to(device)
            position_embeddings = _position_embeddings(rotary, hidden_states, position_ids, layer_type)
        arguments = {
            "position_embeddings": position_embeddings,
            "position_ids": position_ids,
            "layer_idx": getattr(module, "layer_idx", 0),
            "shared_kv_states": self._shared_keys.setdefault((theta, positions), {}),
        }
        parameters = inspect.signature(type(module).forward).parameters
        arguments = {name: value for name, value in arguments.items() if name in parameters}

        own_rotary = found.module
        intercept(module)
        setattr(found.holder, found.attribute, rotary)
        try:
            capture = _run_up_to_attention(module, hidden_states, arguments)
        finally:
            setattr(found.holder, found.attribute, own_rotary)
            restore(module)
            if hasattr(module, "_hf_hook"):
                module._hf_hook.post_forward(module, ())
        _refuse_own_key_selection(module, capture)
        return capture.query.detach(), capture.key.detach()


def _run_up_to_attention(
    module: nn.Module, hidden_states: torch.Tensor, arguments: dict[str, Any]
) -> _QueryKeyCapture:
    capture = _QueryKeyCapture()
    vectors = _uneven_vectors(module)
    length = hidden_states.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).triu(1)
    mask = torch.zeros(1, 1, length, length, device=hidden_states.device, dtype=hidden_states.dtype)
    failure = None
    # Most modules run without a mask; those that choose keys themselves need one; in others it is not a tensor.
    for attention_mask in (None, mask.masked_fill(future, torch.finfo(mask.dtype).min)):
        keywords = {"moice": capture, "attention_mask": attention_mask, **arguments}
        try:
            torch.func.functional_call(module, vectors, (hidden_states,), keywords)
        except _QueryKeyCapture:
            return capture
        except Exception as error:
            failure = failure or error
        else:
            raise UnsupportedLayerError("its attention function did not receive the keyword arguments of its forward")
    raise UnsupportedLayerError(f"it could not be run on its own ({type(failure).__name__}: {failure})") from failure


def _refuse_own_key_selection(module: nn.Module, capture: _QueryKeyCapture) -> None:
    """Refuse sparse attention that reads the name of the attention implementation, which is ours."""
    selections = [
        name
        for name, value in capture.kwargs.items()
        if name != "position_ids" and isinstance(value, torch.Tensor) and not value.is_floating_point()
    ]
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    names = {name for value in constants for name in (value if isinstance(value, tuple) else (value,))}
    if selections and names & _IMPLEMENTATION_NAMES:
        raise UnsupportedLayerError(
            f"it selects keys itself (`{selections[0]}`), in a way that depends on the name of the attention "
            "implementation"
        )


def _is_rotary(module: nn.Module) -> bool:
    has_frequencies = any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    return has_frequencies and hasattr(module, "config")


def _layer_type(module: nn.Module, rotary: nn.Module) -> str | None:
    """The module's key into `rope_parameters` where the model has angles per layer type, else None."""
    if not isinstance(getattr(rotary, "rope_type", None), dict):
        return None
    layer_type = getattr(module, "layer_type", None)
    if layer_type is None:
        layer_types = getattr(module.config, "layer_types", None)
        if layer_types is None or not hasattr(module, "layer_idx"):
            raise UnsupportedLayerError("the model has angles per layer type, but this layer has no type")
        layer_type = layer_types[module.layer_idx]
    if layer_type not in rotary.config.rope_parameters:
        raise UnsupportedLayerError(f"the model's config has no rope parameters for layers of type {layer_type!r}")
    return layer_type


def _layouts(size: int, head_dim: int) -> Iterator[tuple[RotaryLayout, int]]:
    for direction in (1, -1):
        for start in dict.fromkeys((0, head_dim - size)):
            for interleaved in (False, True):
                if start >= 0:
                    yield RotaryLayout(start, size, interleaved), direction


def _explains(
    deltas: torch.Tensor,
    layout: RotaryLayout,
    positions: tuple[int, ...],
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> bool:
    """Whether turning by `deltas` `[P]` makes the second tensor `[1, H, S, D]` of every pair out of the first.

    Looks at the tokens at `positions`, and not at those behind them.
    """
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * deltas

    def explained(own: torch.Tensor, turned: torch.Tensor) -> bool:
        own, turned = (x[..., : len(positions), :].cpu() for x in (own, turned))
        predicted = rotate(own, angles.cos().float(), angles.sin().float(), layout)
        tolerance = 32 * torch.finfo(own.dtype).eps * own.float().abs().max().item()
        return torch.allclose(predicted.float(), turned.float(), rtol=0, atol=tolerance)

    return all(explained(own, turned) for own, turned in pairs)


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


def _uneven_vectors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values for the module's one-dimensional parameters that differ from entry to entry.

    The weight of a norm after the rotary embedding commutes with rotations only while all of its entries are equal, as
    they are in a model that was not trained yet.
    """
    if hasattr(module, "_hf_hook"):
        return {}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (1 + torch.rand(parameter.shape, generator=generator)).to(parameter)
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point()
    }


def _hidden_states(module: nn.Module, length: int) -> torch.Tensor:
    """Random input `[1, length, hidden size]`; where no projection reads the hidden size, of the first one's."""
    widths = [child.in_features for child in module.modules() if hasattr(child, "in_features")]
    width = module.config.hidden_size
    if widths and width not in widths:
        width = widths[0]
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))


def _position_embeddings(
    rotary: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None
) -> Any:
    """What the model would give to its layers; text positions on all axes where positions have several."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    try:
        return rotary(hidden_states, position_ids, **options)
    except (IndexError, RuntimeError):
        pass
    try:
        return rotary(hidden_states, position_ids.expand(3, *position_ids.shape), **options)
    except Exception as error:
        raise UnsupportedLayerError(
            f"its rotary embedding could not be run ({type(error).__name__}: {error})"
        ) from error


@torch.no_grad()
def _observe_position_embeddings(model: nn.Module) -> dict[nn.Module, Any]:
    """The `position_embeddings` that each attention module receives when the model runs on three tokens."""
    received = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        received[module] = {**dict(zip(names, args, strict=False)), **kwargs}.get("position_embeddings")

    modules = [model.get_submodule(name) for name in attention_module_names(model)]
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        model(input_ids=torch.arange(3, device=model.device)[None], use_cache=False)
    except Exception as error:
        raise UnsupportedLayerError(
            "it depends on the model which rotary embedding this layer gets, and the model could not be run to see "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return received
