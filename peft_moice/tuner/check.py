"""Whether the adapted layers take part in what the model computes.

Each pass of a layer makes sure that its mixture was asked for ([`MixesAngles.finish`]). [`check`] sees what a layer
cannot: that nobody calls it, for example because a later version of transformers computes attention elsewhere.
"""

from typing import Any

import torch
from torch import nn

from ..attention.interface import bypassed
from ..probing.evaluation_mode import evaluating
from ..routing.mixture import MixesAngles
from ..standalone.built_in import ROUTERS_NAME, BuiltInRouters


def check(model: nn.Module, **inputs: Any) -> list[str]:
    """Run `model` once, without gradients and compiled code, and make sure that every adapted layer mixes its angles.

    Args:
        model: a `PeftModel`, its `base_model`, or a model with routers built in.
        inputs: what to call it with. Default: two tokens; with ropes by position, two more where these apply.

    Returns:
        The names of the attention modules that mix their angles, all of which took part.

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
            for tokens in [inputs] if inputs else _two_tokens(model, modules):
                model(**tokens)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, module in modules.items() if module not in called]
    if missed:
        raise bypassed(f"A pass of {type(model).__name__} did not call the adapted attention modules {missed[:5]}")
    return list(modules)


def _mixing(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model calls for attention and that mix angles: wrappers, and those without a wrapper that
    have routers built in."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        mixing = getattr(module, ROUTERS_NAME, module)
        is_called = not isinstance(module, BuiltInRouters) and not name.endswith(".base_layer")
        if is_called and isinstance(mixing, MixesAngles) and (mixing.shares() or mixing.by_position()):
            found[name] = module
    return found


def _two_tokens(model: Any, modules: dict[str, nn.Module]) -> list[dict[str, torch.Tensor]]:
    """Arguments of a pass at the beginning, and of one where the first rope by position that is not the model's own
    applies."""
    weight = model.get_input_embeddings().weight
    tokens = torch.arange(2, device="cpu" if weight.is_meta else weight.device)[None]
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    first = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if is_encoder_decoder else {})
    mixing: list[Any] = [getattr(module, ROUTERS_NAME, module) for module in modules.values()]
    ropes = (module.by_position() for module in mixing)
    starts = [rope.first for found in ropes if found for rope in found.experts if not rope.is_own]
    return [first, {**first, "position_ids": tokens + min(starts)}] if starts else [first]
