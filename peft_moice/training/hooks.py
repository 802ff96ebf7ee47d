"""The two forward hooks of whatever runs the adapted layers: the model that computes the loss, and those inside it.

A loss added in the tuner's own forward would be lost wherever PEFT or transformers call that model directly: with
`task_type` unset, or after `model.add_adapter`. And trainers that compute a loss from hidden states call the decoder
inside of it. A pass belongs to the outermost model that was called.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..routing.mixture import MixesAngles
from .model_outputs import add_to_loss, with_entry
from .pass_records import PassRecords, mixing_layers, shifts_labels

_NAME = "moice_hooks"
_HANDLES = "moice_hook_handles"
"""Attribute of a model: torch's handles of its own hooks. So copies of an inner model hold nothing of the outer."""
_PASS = "moice_pass"
"""Attribute of a model: the pass that is going on, if anybody asked for its records. It is not one of its hooks, which
the replicas of `nn.DataParallel` have in common."""


@dataclass
class RouterHooks:
    """The hooks of one model and the models inside it, kept by each of them under `moice_hooks`.

    Attributes:
        shifts_labels: whether the model that computes the loss shifts its labels.
        observer: called with the records of every training pass; see `callback.py`.
        collected: takes the balance losses in place of `outputs.loss`; see [`collect_balance_loss`].
    """

    shifts_labels: bool = False
    observer: Callable[[PassRecords], None] | None = None
    collected: list[PassRecords] | None = None


def register_hooks(model: nn.Module) -> None:
    """Register both hooks on `model` and on the models inside it that run adapted layers, where they are missing."""
    hooks: RouterHooks = vars(model).get(_NAME) or RouterHooks(shifts_labels(model))
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel) and mixing_layers(module)]
    for module in dict.fromkeys([model, *inner]):
        if _NAME not in vars(module):
            before = module.register_forward_pre_hook(start_recording, with_kwargs=True)
            after = module.register_forward_hook(add_balance_loss, with_kwargs=True, always_call=True)
            setattr(module, _HANDLES, (before, after))
            setattr(module, _NAME, hooks)


def remove_hooks(model: nn.Module) -> None:
    """Undo [`register_hooks`]."""
    hooks: RouterHooks | None = vars(model).get(_NAME)
    for module in model.modules() if hooks is not None else ():
        if vars(module).get(_NAME) is hooks:
            for handle in getattr(module, _HANDLES):
                handle.remove()
            for name in (_NAME, _HANDLES, _PASS):
                vars(module).pop(name, None)


def hooks_of(model: nn.Module) -> RouterHooks:
    """The hooks of the module below `model` (PEFT's or an engine's wrapper) that has them.

    Raises:
        ValueError: there is none.
    """
    hooks = _find(model)
    if hooks is not None:
        return hooks
    raise ValueError(f"{type(model).__name__} has no MoICE adapter. Add one with `peft.get_peft_model` first.")


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Passes of `model` inside are none of its task: nothing of them is observed, collected, or added to a loss."""
    hooks = _find(model) or RouterHooks()
    before = hooks.observer, hooks.collected
    hooks.observer, hooks.collected = None, []
    try:
        yield
    finally:
        hooks.observer, hooks.collected = before


def start_recording(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: ask the layers for their records, if the pass trains or its router logits are requested."""
    if getattr(model, _PASS, None) is not None:
        _stop_recording(model)  # of a pass that was broken off
    if not (model.training or kwargs.get("output_router_logits")):
        return
    for module in model.modules():
        if getattr(module, _PASS, None) is not None:
            _stop_recording(module)  # interrupted, for it is not this pass that it runs in
    layers = mixing_layers(model)
    if any(layer.recorder is not None for layer in layers):
        return  # the pass is part of an outer model's
    if model.training and torch.is_grad_enabled():
        _check_training(model, layers, args, kwargs)
    records = PassRecords(model, args, kwargs, hooks_of(model).shifts_labels)
    setattr(model, _PASS, records)
    for layer in layers:
        layer.recorder = records


def add_balance_loss(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook: add `router_aux_loss_coef` times the balance loss of every active adapter to the loss.

    The loss is `outputs` itself if that is a scalar, the entry or attribute `loss`, or a scalar at the start of a
    tuple. Added is what routers learn from: the balance loss of trainable routers that keep fewer experts than they
    have. `outputs.aux_loss` holds the balance loss of the active routers whose coefficient is not zero, without the
    coefficient, and with `output_router_logits=True`, `outputs.router_logits` holds a tuple of `[B, H, S, N]` logits,
    one per layer (a dict of such tuples with several active adapters). Where the model has attributes of these names,
    ours are called `outputs.moice_aux_loss` and `outputs.moice_router_logits`.
    """
    hooks = hooks_of(model)
    passed: PassRecords | None = getattr(model, _PASS, None)
    if passed is None:
        return outputs
    _stop_recording(model)
    if not passed.records or outputs is None:
        return outputs  # nothing adapted ran, or the pass has raised
    if kwargs.get("output_router_logits"):
        outputs = with_entry(outputs, "router_logits", passed.router_logits())
    if not model.training:
        return outputs
    if hooks.observer is not None and torch.is_grad_enabled():
        hooks.observer(passed)
    if hooks.collected is not None:
        if torch.is_grad_enabled():
            hooks.collected.append(passed)
        return outputs
    extra = passed.balance_loss(passed.arguments.get("labels"), passed.arguments.get("num_items_in_batch"))
    if passed.aux_loss is None:
        return outputs
    return add_to_loss(with_entry(outputs, "aux_loss", passed.aux_loss), extra)


def _find(model: nn.Module) -> RouterHooks | None:
    return next((vars(module)[_NAME] for module in model.modules() if _NAME in vars(module)), None)


def _stop_recording(model: nn.Module) -> None:
    # From here on, the second forward pass of gradient checkpointing must not leave anything behind.
    for layer in mixing_layers(model):
        layer.recorder = None
    setattr(model, _PASS, None)


def _check_training(
    model: nn.Module, layers: list[MixesAngles], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    shares = [share for layer in layers for share in layer.shares()]
    if any(share.router.is_trainable for share in shares):
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError(
                "Routers cannot be trained under tensor parallelism: every process would see the gradient of its own "
                "heads only. Train with data parallelism, FSDP or DeepSpeed; for inference, call `model.eval()`."
            )
    elif shares and not torch.compiler.is_compiling():
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if not any(tensor.requires_grad for tensor in (*inputs, *model.parameters())):
            warnings.warn(
                f"The model is in training mode, but all of its weights are frozen, the routers of "
                f"{sorted({share.name for share in shares})} among them, so nothing will be trained. Load an adapter "
                "to train it with `PeftModel.from_pretrained(model, adapter, is_trainable=True)`; for inference, call "
                "`model.eval()`.",
                stacklevel=2,
            )
