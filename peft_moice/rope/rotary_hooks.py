"""Hooks on a model's rotary embeddings: they pass positions on, and refuse angles that have grown."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .given_positions import give_positions
from .layer_rope import LayerRope
from .weak_module import WeakModule


def attach_rotary_hooks(model: nn.Module, ropes: Iterable[LayerRope], mixes: Callable[[nn.Module], bool]) -> None:
    """Hook those rotary embeddings of `model` that `ropes` were learned from. Called again, it starts afresh.

    Args:
        model: the model.
        ropes: those of its layers that mix angles.
        mixes: whether a model mixes angles at the time of the call; a function of a module, for the sake of pickles.
    """
    detach_rotary_hooks(model)
    rotaries = {(rope.rotary, id(rope.config)) for rope in ropes}
    for module in model.modules():
        if (type(module), id(getattr(module, "config", None))) in rotaries:
            module.register_forward_hook(give_positions, with_kwargs=True)
            if "dynamic" in _rope_types(module).values():
                module.register_forward_hook(functools.partial(_check_growth, WeakModule(model), mixes))


def detach_rotary_hooks(model: nn.Module) -> None:
    """Undo [`attach_rotary_hooks`]."""
    # Found by their function, because handles would not survive copies and pickles of the model.
    for module in model.modules():
        for handle_id, hook in list(module._forward_hooks.items()):
            if getattr(hook, "func", hook) in (give_positions, _check_growth):
                del module._forward_hooks[handle_id]
                module._forward_hooks_with_kwargs.pop(handle_id, None)


def _rope_types(rotary: nn.Module) -> dict[str, Any]:
    """Names of rope types by the prefix that their attributes have, which is empty where all layers have the same."""
    rope_type = getattr(rotary, "rope_type", None)
    return {f"{kind}_": value for kind, value in rope_type.items()} if isinstance(rope_type, dict) else {"": rope_type}


def _check_growth(
    held: WeakModule, mixes: Callable[[nn.Module], bool], rotary: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    """Refuse angles of the rope type dynamic that have grown beyond the original length.

    Transformers notes the length that the angles are made for: a number at first, a tensor once they have grown.
    """
    names = [f"{prefix}max_seq_len_cached" for prefix in _rope_types(rotary)]
    has_grown = any(isinstance(getattr(rotary, name, None), torch.Tensor) for name in names)
    if has_grown and (model := held()) is not None and mixes(model):
        raise ValueError(
            f"The angles of the rope type 'dynamic' have grown with a sequence beyond the model's original length of "
            f"{rotary.original_max_seq_len} tokens, and change with every token, while keys in the cache keep the old "
            f"ones. Keep below {rotary.original_max_seq_len} tokens, which also sets the angles back; use "
            "`disable_adapter()`, or give the model a rope type with fixed angles, such as 'linear' or 'yarn'."
        )
