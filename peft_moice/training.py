"""The balance loss on its way into `outputs.loss`, and the router logits on theirs to the caller.

Both are forward hooks of the model that computes the loss. A loss added in the tuner's own forward would be lost
wherever PEFT or transformers call that model directly: with `task_type` unset, or after `model.add_adapter`.
"""

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from .config import RouterSpec
from .mixture import MixesAngles
from .router import balance_loss


def register_hooks(model: nn.Module) -> None:
    """Register both hooks on `model`, unless they are there already."""
    if collect_router_logits not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(collect_router_logits, with_kwargs=True)
        model.register_forward_hook(add_balance_loss, with_kwargs=True)


def remove_hooks(model: nn.Module) -> None:
    """Undo [`register_hooks`]."""
    # Found by identity, because handles would not survive copies and pickles of the model.
    for hooks, flags, function in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, collect_router_logits),
        (model._forward_hooks, model._forward_hooks_with_kwargs, add_balance_loss),
    ):
        for handle_id in [key for key, hook in hooks.items() if hook is function]:
            del hooks[handle_id]
            flags.pop(handle_id, None)


def mixing_layers(model: nn.Module) -> list[MixesAngles]:
    """The layers of `model` that mix angles, whether by an adapter or by routers of their own."""
    return [module for module in model.modules() if isinstance(module, MixesAngles)]


def collect_router_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: ask the layers for their router logits, if the pass trains or requests them."""
    if model.training or kwargs.get("output_router_logits"):
        for layer in mixing_layers(model):
            layer.router_logits = {}


def add_balance_loss(model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook: add `router_aux_loss_coef` times the balance loss of every active adapter to the loss.

    The loss is found at `outputs.loss`, or first in a tuple. `outputs.aux_loss` holds the balance loss itself, and
    with `output_router_logits=True`, `outputs.router_logits` holds a tuple of `[B, H, S, N]` logits, one per layer (a
    dict of such tuples with several active adapters; `outputs.moice_router_logits` where the model has router logits
    of its own).
    """
    if not (model.training or kwargs.get("output_router_logits")):
        return outputs
    collected: dict[str, list[torch.Tensor]] = {}
    specs: dict[str, RouterSpec] = {}
    for layer in mixing_layers(model):
        for member in layer.members() if layer.router_logits else ():
            collected.setdefault(member.name, []).append(layer.router_logits[member.name])
            specs[member.name] = member.spec
        # From here on, the second forward pass of gradient checkpointing must not leave anything behind.
        layer.router_logits = None
    if not collected:
        return outputs
    if kwargs.get("output_router_logits") and not isinstance(outputs, tuple):
        logits = {name: tuple(values) for name, values in collected.items()}
        own = getattr(outputs, "router_logits", None)
        setattr(
            outputs,
            "router_logits" if own is None else "moice_router_logits",
            next(iter(logits.values())) if len(logits) == 1 else logits,
        )
    if not model.training:
        return outputs

    arguments = _arguments(model, args, kwargs)
    token_mask = _token_mask(arguments, next(iter(collected.values()))[0])
    aux_loss, weighted = 0.0, 0.0
    for name, values in collected.items():
        if specs[name].router_aux_loss_coef > 0:
            loss = balance_loss(values, specs[name].top_k, token_mask)
            aux_loss, weighted = aux_loss + loss, weighted + specs[name].router_aux_loss_coef * loss
    if not isinstance(weighted, torch.Tensor):
        return outputs
    return _with_loss(outputs, arguments, weighted * _share_of_batch(arguments), aux_loss)


def _with_loss(outputs: Any, arguments: dict[str, Any], extra: torch.Tensor, aux_loss: torch.Tensor) -> Any:
    if isinstance(outputs, tuple):
        if arguments.get("labels") is None:
            return outputs
        return (outputs[0] + extra.to(outputs[0].device), *outputs[1:])
    outputs.aux_loss = aux_loss.detach()
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + extra.to(outputs.loss.device)
    elif torch.is_grad_enabled() and extra.requires_grad:
        warnings.warn(
            "The model returned no loss, so the balance loss of MoICE was not added (label smoothing and custom loss "
            "functions compute the loss outside the model). Pass `labels` to the model, or set "
            "`router_aux_loss_coef=0` in MoICEConfig.",
            stacklevel=2,
        )
    return outputs


def _arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the forward pass by name."""
    names = inspect.signature(type(model).forward).parameters
    return {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}


def _token_mask(arguments: dict[str, Any], logits: torch.Tensor) -> torch.Tensor | None:
    """Mask `[B, S]` of tokens that are not padding, or None if all count."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    return mask[:, -logits.shape[-2] :]


def _share_of_batch(arguments: dict[str, Any]) -> float | torch.Tensor:
    """Share of this pass in the batch of an optimizer step.

    Under gradient accumulation, Trainer passes `num_items_in_batch` and the model divides its loss by it, so that the
    losses of the micro-batches add up; a term added whole would count once per micro-batch.
    """
    num_items, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
    if num_items is None or labels is None:
        return 1.0
    return labels[..., 1:].ne(-100).sum() / num_items
