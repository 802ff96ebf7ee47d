"""What a model returned: finding its loss, adding to it, and noticing that it was left out."""

import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from transformers.utils.generic import ModelOutput


def add_to_loss(outputs: Any, extra: torch.Tensor) -> Any:
    """`outputs` with `extra` added to the loss, where there is one.

    The loss is `outputs` itself if that is a scalar, the entry or attribute `loss`, or a scalar at the start of a
    tuple.
    """
    if isinstance(outputs, torch.Tensor):
        return _sum(outputs, extra) if outputs.dim() == 0 else outputs
    if isinstance(outputs, MutableMapping):
        if outputs.get("loss") is not None:
            outputs["loss"] = _sum(outputs["loss"], extra)
        return outputs
    if isinstance(outputs, (tuple, list)):
        fields, rebuild = getattr(outputs, "_fields", ()), getattr(type(outputs), "_make", type(outputs))
        index = fields.index("loss") if "loss" in fields else 0
        if not outputs or not isinstance(outputs[index], torch.Tensor) or outputs[index].dim() > 0:
            return outputs
        return rebuild([*outputs[:index], _sum(outputs[index], extra), *outputs[index + 1 :]])
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = _sum(outputs.loss, extra)
    return outputs


def add_entry(outputs: Any, name: str, value: Any) -> None:
    """Give `outputs` an attribute, or an entry if it is a plain dict; called `moice_...` if the name is taken.

    Tensors and tuples have no place for it.
    """
    if isinstance(outputs, (torch.Tensor, tuple, list)):
        return
    if isinstance(outputs, MutableMapping) and not isinstance(outputs, ModelOutput):
        outputs[name if outputs.get(name) is None else f"moice_{name}"] = value
    else:
        setattr(outputs, name if getattr(outputs, name, None) is None else f"moice_{name}", value)


def warn_if_left_out(extra: torch.Tensor, outputs: Any) -> None:
    """Warn after a backward pass in which `outputs` take part beside their loss, but `extra` does not."""
    if not extra.requires_grad or torch.compiler.is_compiling():
        return
    # The hooks must not refer to tensors: a cycle through the graph would never be freed.
    reached: set[str] = set()

    def reach_balance(gradient: torch.Tensor) -> None:
        reached.add("balance")

    def reach_outputs(gradient: torch.Tensor) -> None:
        if "outputs" not in reached:
            reached.add("outputs")
            torch.autograd.Variable._execution_engine.queue_callback(report)

    def report() -> None:
        if "balance" not in reached:
            warnings.warn(
                "The loss was computed outside the model, so the balance loss of MoICE has no part in it. In a "
                "Trainer, mix in `peft_moice.BalanceLossMixin`; in a training loop, use "
                "`peft_moice.collect_balance_loss`; or set `router_aux_loss_coef=0` in MoICEConfig.",
                stacklevel=2,
            )
        reached.clear()

    extra.register_hook(reach_balance)
    for tensor in _tensors_beside_the_loss(outputs):
        if tensor.requires_grad:
            tensor.register_hook(reach_outputs)


def _tensors_beside_the_loss(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        values = [outputs] if outputs.dim() > 0 else []
    elif isinstance(outputs, MutableMapping):
        values = [value for name, value in outputs.items() if name != "loss"]
    elif isinstance(outputs, (tuple, list)):
        values = [value for value in outputs if not (isinstance(value, torch.Tensor) and value.dim() == 0)]
    else:
        values = (
            [value for name, value in vars(outputs).items() if name != "loss"] if hasattr(outputs, "__dict__") else []
        )
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _sum(loss: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    return loss + extra.to(loss.device)
