"""Which modules of a model are attention modules, and what to tell users whose choice cannot be adapted."""

from typing import Any

from torch import nn

from ..attention.interface import uses_attention_interface


def attention_module_names(model: nn.Module) -> list[str]:
    """Names, within `model`, of the decoder's attention modules that go through transformers' attention interface.

    Encoders of other modalities are left out by asking the model for its decoder.
    """
    inside = {id(module) for module in decoder_of(model).modules()}
    return [
        name for name, module in model.named_modules() if id(module) in inside and uses_attention_interface(module)
    ]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of `model` that reads and writes text."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = model if get_decoder is None else get_decoder()
    # Where a model calls something else its decoder (ModernBERT: the head), all of it is searched.
    return decoder if any(map(uses_attention_interface, decoder.modules())) else model


def explain_target(model: nn.Module, name: str) -> str:
    """Why the module called `name`, which is no attention module, is no target, and which names are."""
    attention = [f"{found}." for found in attention_module_names(model)]
    around = [found for found in attention if f"{name}.".startswith(found)]
    suffixes = sorted(
        {found.rstrip(".").removesuffix(".base_layer").rpartition(".")[2] for found in around or attention}
    )
    part_of = f" is a part of the attention module {around[-1].rstrip('.')!r}, and" if around else ""
    suggestion = f"; name those, as in target_modules={suffixes}" if suffixes else ""
    kind = type(model.get_submodule(name)).__name__
    return (
        f"`target_modules` selects {name!r} ({kind}), which{part_of} does not call transformers' attention interface "
        f"itself. MoICE adapts attention modules as a whole{suggestion}. By default it adapts all that it can."
    )


def explain_no_targets(model: nn.Module, reasons: set[str]) -> str:
    """Why no attention module of `model` can be adapted, by the `reasons` of their plans, and what the user can do."""
    outside = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if "Attention" in type(module).__name__ and not uses_attention_interface(module)
        }
    )
    if reasons:
        reason = f"none of its attention modules has {' and '.join(sorted(reasons))}"
    elif outside:
        reason = f"its attention modules ({', '.join(outside)}) do not go through transformers' attention interface"
    else:
        reason = "it has no attention modules that go through transformers' attention interface"
    return (
        f"MoICE cannot be applied to {type(model).__name__}: {reason}. It works on RoPE models of transformers; if "
        "this is one, name its attention modules with `target_modules`."
    )
