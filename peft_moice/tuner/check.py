"""Whether the adapted layers take part in what the model computes.

Each pass of a layer makes sure that its mixture was asked for ([`LayerMixture.run`]). What a layer cannot see is that
nobody calls it, for example because a later version of transformers computes attention elsewhere. The first pass
after an adapter was injected looks for that by hooks, which then go, and [`check`] on demand.
"""

from typing import Any

import torch
from torch import nn

from ..attention.interface import bypassed
from ..probing.evaluation_mode import evaluating
from ..routing.mixture import MixesAngles
from ..standalone.built_in import ROUTERS_NAME, BuiltInRouters

_WAS_CALLED = "was_called"
"""Attribute of adapted modules, see [`MixesAngles`]; on those without a wrapper it is set from outside."""


def watch_first_pass(model: nn.Module) -> None:
    """Have the next pass of `model` raise a RuntimeError if it leaves out all adapted attention modules of some kind.

    Kinds are the classes of attention modules. A single one may be left out rightly, as where training drops layers;
    an upgrade of transformers changes a class.
    """
    unwatch_first_pass(model)
    for module in _adapted(model).values():
        setattr(module, _WAS_CALLED, False)
        module.register_forward_pre_hook(_note_call)
    model.register_forward_hook(_check_pass)


def unwatch_first_pass(model: nn.Module) -> None:
    """Undo [`watch_first_pass`]."""
    # Found by their function, because handles would not survive copies and pickles of the model.
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle_id, hook in list(hooks.items()):
                if hook in (_note_call, _check_pass):
                    hooks.pop(handle_id, None)


def check(model: nn.Module, **inputs: Any) -> None:
    """Run `model` once, without gradients and compiled code, and make sure that every adapted layer mixes its angles.

    Args:
        model: a `PeftModel`, its `base_model`, or a model with routers built in.
        inputs: what to call it with. Default: two tokens.

    Raises:
        RuntimeError: attention modules were not called, or computed attention without the mixture.
        ValueError: no layer of `model` mixes angles, as without an active adapter.
    """
    modules = _mixing(model)
    if not modules:
        raise ValueError(
            f"No layer of {type(model).__name__} mixes angles, so there is nothing to check. Add an adapter, and "
            "switch it on with `set_adapter` or `enable_adapter_layers`."
        )
    called: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in modules.values()
    ]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            model(**(inputs or _two_tokens(model)))
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, module in modules.items() if module not in called]
    if missed:
        raise bypassed(f"A pass of {type(model).__name__} did not call the adapted attention modules {missed[:5]}")


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model calls for attention: wrappers, and those with routers built in and no wrapper."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MixesAngles) or hasattr(module, ROUTERS_NAME)
        if not isinstance(module, BuiltInRouters) and not name.endswith(".base_layer")
    }


def _mixing(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the adapted modules that have routers at work."""
    adapted: dict[str, Any] = {**_adapted(model)}
    return {name: module for name, module in adapted.items() if getattr(module, ROUTERS_NAME, module).shares()}


def _kind(module: nn.Module) -> type[nn.Module]:
    attention: nn.Module = getattr(module, "base_layer", module)
    return type(attention)


def _two_tokens(model: Any) -> dict[str, torch.Tensor]:
    weight = model.get_input_embeddings().weight
    tokens = torch.arange(2, device="cpu" if weight.is_meta else weight.device)[None]
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if is_encoder_decoder else {})


def _note_call(module: nn.Module, args: tuple[Any, ...]) -> None:
    setattr(module, _WAS_CALLED, True)


def _check_pass(model: nn.Module, args: tuple[Any, ...], output: object) -> None:
    if torch.compiler.is_compiling():
        return
    # Routers that were built in after the hooks were set are called by the modules that are watched.
    modules = {name: module for name, module in _mixing(model).items() if _WAS_CALLED in vars(module)}
    kinds = {_kind(module) for module in modules.values() if module.was_called}
    missed = [name for name, module in modules.items() if _kind(module) not in kinds]
    if missed:
        raise bypassed(f"The first pass of {type(model).__name__} did not call the adapted modules {missed[:5]}")
    if modules and all(module.was_called for module in modules.values()):
        unwatch_first_pass(model)
