"""Runs a whole model on a few tokens, and sees what it hands to its attention modules."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention_modules import attention_module_names, decoder_of
from .running import UnsupportedLayerError, undisturbed

_NUM_TOKENS = 3
_NUM_ENCODER_STATES = 5


@dataclass
class Observation:
    """What one attention module received.

    Attributes:
        hidden_states: `[1, S, hidden size]`.
        position_embeddings: what a rotary embedding gave, or None.
        position_ids: `[1, S]`, or None where the module does not receive them.
        has_other_keys: whether it received states of other than its own tokens, to make keys of.
    """

    hidden_states: torch.Tensor
    position_embeddings: Any
    position_ids: torch.Tensor | None
    has_other_keys: bool


def observe(model: nn.Module) -> dict[nn.Module, Observation]:
    """What each attention module that may be adapted receives when `model` runs on three tokens.

    Decoders that attend to an encoder get random states from it. Inputs need gradients, because quantized layers may
    repack their weights for inference, for good, where none are needed.

    Raises:
        UnsupportedLayerError: the model could not be run.
    """
    received: dict[nn.Module, Observation] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden_states = args[0] if args else kwargs["hidden_states"]
        position_ids = arguments.get("position_ids")
        received[module] = Observation(
            hidden_states.detach(),
            arguments.get("position_embeddings"),
            position_ids if isinstance(position_ids, torch.Tensor) else None,
            any(
                isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[-2] == _NUM_ENCODER_STATES
                for value in arguments.values()
            ),
        )

    def need_gradients(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.requires_grad_() if isinstance(output, torch.Tensor) else output

    names = attention_module_names(model)
    handles = [model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True) for name in names]
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(embeddings, nn.Module):
        handles.append(embeddings.register_forward_hook(need_gradients))
    device = getattr(model, "device", None) or next(model.parameters()).device
    failure = None
    try:
        with undisturbed(model), torch.enable_grad():
            for part, keywords in _calls(model, device):
                received.clear()
                try:
                    part(input_ids=torch.arange(_NUM_TOKENS, device=device)[None], use_cache=False, **keywords)
                except Exception as error:
                    failure = failure or error
                else:
                    return received
        raise UnsupportedLayerError(
            "what this layer receives depends on the model, and the model could not be run to see "
            f"({type(failure).__name__}: {failure})"
        ) from failure
    finally:
        for handle in handles:
            handle.remove()
        del failure  # whose traceback holds this frame, and so the model


def _calls(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Parts of `model` to run and keyword arguments to run them with; the first that can be run tells."""
    decoder = decoder_of(model)
    calls: list[tuple[nn.Module, dict[str, torch.Tensor]]] = [(model, {}), (decoder, {})]
    if "encoder_hidden_states" not in inspect.signature(type(decoder).forward).parameters:
        return calls
    config = decoder.config
    sizes = [getattr(config, name, None) for name in ("cross_attention_hidden_size", "hidden_size", "d_model")]
    dtype = next((p.dtype for p in decoder.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, _NUM_ENCODER_STATES, size, generator=generator, device="cpu", dtype=torch.float32)
        for size in dict.fromkeys(size for size in sizes if isinstance(size, int))
    ]
    return [(decoder, {"encoder_hidden_states": state.to(device, dtype)}) for state in states] + calls
