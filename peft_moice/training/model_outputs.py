"""What a model returned: adding to its loss and to its entries."""

import dataclasses
import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from packaging.version import Version


def add_to_loss(outputs: Any, extra: torch.Tensor) -> Any:
    """`outputs` with `extra` added to the loss, which is what [`add_balance_loss`] says; a warning where there is
    none, and `extra` can be learned from.
    """
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 0:
        return _sum(outputs, extra)
    if isinstance(outputs, MutableMapping) and outputs.get("loss") is not None:
        outputs["loss"] = _sum(outputs["loss"], extra)
        return outputs
    if isinstance(outputs, (tuple, list)) and outputs:
        fields, rebuild = getattr(outputs, "_fields", ()), getattr(type(outputs), "_make", type(outputs))
        index = fields.index("loss") if "loss" in fields else 0
        if isinstance(outputs[index], torch.Tensor) and outputs[index].dim() == 0:
            return rebuild([*outputs[:index], _sum(outputs[index], extra), *outputs[index + 1 :]])
    elif getattr(outputs, "loss", None) is not None:
        outputs.loss = _sum(outputs.loss, extra)
        return outputs
    if extra.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            "The loss was computed outside the model, so the balance loss of MoICE has no part in it. In a Trainer, "
            "mix in `peft_moice.BalanceLossMixin`; in a training loop, use `peft_moice.collect_balance_loss`; or set "
            "`router_aux_loss_coef=0` in MoICEConfig.",
            stacklevel=2,
        )
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


def _sum(loss: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    return loss + extra.to(loss.device)
