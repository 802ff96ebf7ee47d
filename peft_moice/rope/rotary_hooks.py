"""Hooks on a model's rotary embeddings: they pass positions on, refuse angles that have grown, and keep longrope at
its short factors where queries have ropes of their own."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .given_positions import give_positions
from .layer_rope import LayerRope
from .weak_module import WeakModule

_HELD = "_moice_holds_short_factors"

Ask = Callable[[nn.Module], bool]
"""A question about a model as it is at the time of a call; a function of a module, for the sake of pickles."""


def attach_rotary_hooks(model: nn.Module, ropes: Iterable[LayerRope], mixes: Ask, has_ropes: Ask) -> None:
    """Hook those rotary embeddings of `model` that `ropes` were learned from. Called again, it starts afresh.

    Args:
        model: the model.
        ropes: those of its layers that mix angles.
        mixes: whether a model mixes angles.
        has_ropes: whether its queries have ropes by their positions, over the short factors of longrope.
    """
    detach_rotary_hooks(model)
    rotaries = {(rope.rotary, id(rope.config)) for rope in ropes}
    for module in model.modules():
        if (type(module), id(getattr(module, "config", None))) in rotaries:
            module.register_forward_hook(give_positions, with_kwargs=True)
            if "longrope" in _rope_types(module).values():
                module.register_forward_pre_hook(functools.partial(_hold_short_factors, WeakModule(model), has_ropes))
            if "dynamic" in _rope_types(module).values():
                module.register_forward_hook(functools.partial(_check_growth, WeakModule(model), mixes))


def detach_rotary_hooks(model: nn.Module) -> None:
    """Undo [`attach_rotary_hooks`]."""
    # Found by their function, because handles would not survive copies and pickles of the model.
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for handle_id, hook in list(hooks.items()):
                if getattr(hook, "func", hook) in (give_positions, _check_growth, _hold_short_factors):
                    del hooks[handle_id]
                    module._forward_hooks_with_kwargs.pop(handle_id, None)
        _let_go(module)


def _rope_types(rotary: nn.Module) -> dict[str, Any]:
    """Names of rope types by the prefix that their attributes have, which is empty where all layers have the same."""
    rope_type = getattr(rotary, "rope_type", None)
    return {f"{kind}_": value for kind, value in rope_type.items()} if isinstance(rope_type, dict) else {"": rope_type}


def _hold_short_factors(held: WeakModule, has_ropes: Ask, rotary: nn.Module, args: tuple[Any, ...]) -> None:
    """Let a rotary embedding of type longrope rotate by its short factors at any length: queries that need others are
    turned further, as are the keys for them, so that all keys in a cache carry the same.

    It does so as long as it takes itself for one whose angles never change.
    """
    model = held()
    if model is None or not has_ropes(model):
        return _let_go(rotary)
    if not hasattr(rotary, _HELD):
        own: Any = rotary.rope_type
        setattr(rotary, _HELD, own)
        for prefix, kind in _rope_types(rotary).items():
            if kind == "longrope":
                setattr(rotary, f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq").clone())
        types = own if isinstance(own, dict) else {"": own}
        fixed: Any = {key: "default" if kind == "longrope" else kind for key, kind in types.items()}
        rotary.rope_type = fixed if isinstance(own, dict) else fixed[""]


def _let_go(rotary: nn.Module) -> None:
    """Undo [`_hold_short_factors`]. The next pass chooses factors anew."""
    if hasattr(rotary, _HELD):
        rotary.rope_type = getattr(rotary, _HELD)
        delattr(rotary, _HELD)


def _check_growth(held: WeakModule, mixes: Ask, rotary: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
