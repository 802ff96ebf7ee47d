"""What a model returned: adding to its loss and to its entries, and noticing that an added loss was left out."""

import dataclasses
import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from packaging.version import Version


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


_TRACES_CLASSES = Version(torch.__version__) >= Version("2.13")
"""Whether graphs of torch.compile can make an object of a class that was made outside of them."""


def with_entry(outputs: Any, name: str, value: Any) -> Any:
    """`outputs` with one entry more, or an attribute where they have none; called `moice_...` if the name is taken.

    The entries of a `ModelOutput` are the fields of its class, from which others make it anew: mixed precision,
    copies, several processes, pytrees. So ours are fields of a subclass. Tensors and tuples have no place for one.
    """
    if isinstance(outputs, (torch.Tensor, tuple, list)):
        return outputs
    if not isinstance(outputs, MutableMapping):
        setattr(outputs, name if getattr(outputs, name, None) is None else f"moice_{name}", value)
        return outputs
    name = name if outputs.get(name) is None else f"moice_{name}"
    if torch.compiler.is_compiling() and not _TRACES_CLASSES:
        # An entry of this object alone.
        outputs[name] = value
        return outputs
    if dataclasses.is_dataclass(outputs) and name not in {field.name for field in dataclasses.fields(outputs)}:
        extended = _extended(type(outputs))(**outputs)
        for attribute, other in vars(outputs).items():
            if attribute not in vars(extended):
                setattr(extended, attribute, other)
        outputs = extended
    outputs[name] = value
    return outputs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # what compiled code cannot do is to make a class
def _extended(original: type[Any]) -> type[Any]:
    """A subclass of the dataclass `original` with fields for our entries."""
    if original not in _EXTENDED:
        known = {field.name for field in dataclasses.fields(original)}
        # In the order in which they are set.
        names = ("router_logits", "moice_router_logits", "aux_loss", "moice_aux_loss")
        _EXTENDED[original] = dataclasses.make_dataclass(
            f"MoICE{original.__name__}",
            [(name, Any, None) for name in names if name not in known],
            bases=(original,),
            namespace={"__module__": original.__module__, "__reduce__": _reduce},
        )
    return _EXTENDED[original]


_EXTENDED: dict[type[Any], type[Any]] = {}


def _reduce(outputs: Any) -> tuple[Any, ...]:
    # Pickles cannot find the subclass by its name.
    return _restored, (type(outputs).__base__, dict(outputs))


def _restored(original: type[Any], entries: dict[str, Any]) -> Any:
    return _extended(original)(**entries)


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
