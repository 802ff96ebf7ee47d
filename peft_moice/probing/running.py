"""Runs one attention module on a few tokens, up to its call of the attention function."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import nn

from ..attention.interface import KEYWORD, intercept, restore
from ..rope.own_rotary import OwnRotary

_IMPLEMENTATION_NAMES = {"eager", "sdpa", "flex_attention", "flash_attention_2"}
_FULL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UnsupportedLayerError(ValueError):
    """An attention layer whose position encoding cannot be rotated to other base angles."""


class _Captured(Exception):
    """Leaves the forward pass once queries and keys are known."""


class _QueryKeyCapture:
    """Stands in for a mixture, keeps the queries and keys it was given, and leaves the forward pass."""

    query: torch.Tensor
    key: torch.Tensor
    kwargs: dict[str, Any]

    def attend(self, attend: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **kwargs: Any) -> NoReturn:
        self.query, self.key, self.kwargs = query, key, kwargs
        raise _Captured


def run_up_to_attention(
    module: nn.Module,
    found: OwnRotary | None,
    rotaries: Sequence[nn.Module | None],
    layer_type: str | None,
    positions: tuple[int, ...],
    shared_keys: Sequence[dict[torch.dtype, dict[str, Any]]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries `[1, H, S, D]` and keys that `module` hands to its attention function under each of `rotaries`.

    In float32 where the module can be run so, because rounding in half precision hides what happens to them.

    Args:
        module: the attention module.
        found: the rotary embedding that each of `rotaries` takes the place of, or None.
        rotaries: rotary embeddings; None runs the module without.
        layer_type: the module's key into its rope parameters, or None.
        positions: where the S tokens stand.
        shared_keys: for each of `rotaries`, what layers that share keys hand to each other, by dtype.

    Raises:
        UnsupportedLayerError: the module cannot be run on its own, or chooses keys by the name of the implementation.
    """
    with _on_real_weights(module) as runnable, undisturbed(runnable):

        def run_with(weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            captured = []
            for rotary, keys in zip(rotaries, shared_keys, strict=True):
                with _in_place_of(found, rotary):
                    captured.append(_run(runnable, weights, rotary, layer_type, positions, keys))
            return captured

        in_float32 = _in_float32(runnable)
        if in_float32:
            with suppress(UnsupportedLayerError):
                return run_with(in_float32)
        return run_with({})


@torch.enable_grad()
def _run(
    module: nn.Module,
    weights: dict[str, torch.Tensor],
    rotary: nn.Module | None,
    layer_type: str | None,
    positions: tuple[int, ...],
    shared_keys: dict[torch.dtype, dict[str, Any]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`run_up_to_attention`] under `rotary`, which hangs in its place, with `weights` for the module's own."""
    weight = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), None)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device = torch.device(device if device is not None else (weight.device if weight is not None else "cpu"))
    dtype = torch.float32 if weights or weight is None else weight.dtype
    # Quantized layers may repack their weights for inference, for good, on an input that needs no gradient.
    hidden_states = _hidden_states(module, len(positions)).to(device, dtype).requires_grad_().clone()
    position_ids = torch.tensor([positions], device=device)
    position_embeddings = None
    if rotary is not None:
        rotary = rotary.to(device)
        position_embeddings = position_embeddings_of(rotary, hidden_states, position_ids, layer_type)
    arguments = {
        "position_embeddings": position_embeddings,
        "position_ids": position_ids,
        "layer_idx": getattr(module, "layer_idx", 0),
        "shared_kv_states": shared_keys.setdefault(dtype, {}),
    }
    parameters = inspect.signature(type(module).forward).parameters
    arguments = {name: value for name, value in arguments.items() if name in parameters}

    intercept(module)
    try:
        with torch.autocast(device.type, enabled=False):
            capture = _call(module, _with_uneven_vectors(module, weights), hidden_states, arguments)
    finally:
        restore(module)
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.post_forward(module, ())
    _refuse_own_key_selection(module, capture)
    return capture.query.detach(), capture.key.detach()


def _call(
    module: nn.Module, weights: dict[str, torch.Tensor], hidden_states: torch.Tensor, arguments: dict[str, Any]
) -> _QueryKeyCapture:
    capture = _QueryKeyCapture()
    length = hidden_states.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).triu(1)
    mask = torch.zeros(1, 1, length, length, device=hidden_states.device, dtype=hidden_states.dtype)
    failure = None
    # Most modules run without a mask; those that choose keys themselves need one; in others it is not a tensor.
    try:
        for attention_mask in (None, mask.masked_fill(future, torch.finfo(mask.dtype).min)):
            keywords = {KEYWORD: capture, "attention_mask": attention_mask, **arguments}
            try:
                torch.func.functional_call(module, weights, (hidden_states,), keywords)
            except _Captured:
                return capture
            except Exception as error:
                failure = failure or error
            else:
                raise UnsupportedLayerError(
                    "its attention function did not receive the keyword arguments of its forward"
                )
        reason = f"it could not be run on its own ({type(failure).__name__}: {failure})"
        raise UnsupportedLayerError(reason) from failure
    finally:
        del failure  # whose traceback holds this frame, and so the module


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


def position_embeddings_of(
    rotary: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None
) -> Any:
    """What `rotary` gives for `position_ids` `[B, S]`; text positions on all axes where positions have several.

    Raises:
        UnsupportedLayerError: it cannot be run.
    """
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


@contextmanager
def _in_place_of(found: OwnRotary | None, rotary: nn.Module | None) -> Iterator[None]:
    if found is None:
        yield
        return
    own = found.module
    setattr(found.holder, found.attribute, rotary)
    try:
        yield
    finally:
        setattr(found.holder, found.attribute, own)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run `module` without dropout, and leave its modes and the states of random generators as they are."""
    modes = {part: part.training for part in module.modules()}
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        # Not by `eval()`, which tools give effects of their own.
        for part in modes:
            part.training = False
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode


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


def _in_float32(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights in float32; empty where they are quantized, sharded or brought by hooks."""
    parameters = dict(module.named_parameters())
    if any(hasattr(part, "_hf_hook") for part in module.modules()) or not all(
        type(p) is nn.Parameter and p.dtype in _FULL_DTYPES and p.numel() > 0 for p in parameters.values()
    ):
        return {}
    return {name: parameter.detach().to(torch.float32) for name, parameter in parameters.items()}


def _with_uneven_vectors(module: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, with one-dimensional parameters whose entries differ from each other.

    The weight of a norm after the rotary embedding commutes with rotations only while all of its entries are equal, as
    they are in a model that was not trained yet.
    """
    if hasattr(module, "_hf_hook"):
        return weights
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: weights.get(name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point()
    }
    uneven = {
        name: (1 + torch.rand(value.shape, generator=generator, device="cpu", dtype=torch.float32)).to(value)
        for name, value in vectors.items()
    }
    return {**weights, **uneven}


def _hidden_states(module: nn.Module, length: int) -> torch.Tensor:
    """Random input `[1, length, hidden size]`; where no projection reads the hidden size, of the first one's."""
    widths = [child.in_features for child in module.modules() if hasattr(child, "in_features")]
    config: Any = module.config
    width = config.hidden_size
    if widths and width not in widths:
        width = widths[0]
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
