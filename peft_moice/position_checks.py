"""Refuses token positions that the adapted layers cannot represent.

MoICE counts positions by the order of the keys. That agrees with the model's own positions wherever these go up by one
within a sequence: in plain, left-padded and packed batches. What does not agree is refused by forward hooks before it
is used. They look at prompts only, not at single tokens, so decoding never waits for the device; a single token that
skips positions is found out by the next prompt that continues its cache. Compiled graphs leave these checks out.
"""

import functools

import torch
from torch import nn
from transformers.cache_utils import Cache

from .mixture import MixesAngles
from .rope.positions import find_cache

_NOTE = "_moice_positions"


def watch_positions(model: nn.Module) -> None:
    """Refuse positions that the layers of `model` that mix angles cannot represent. Called again, it starts afresh."""
    unwatch_positions(model)
    model.register_forward_pre_hook(_check_prompt, with_kwargs=True)
    layers = [module for module in model.modules() if isinstance(module, MixesAngles)]
    rotaries = {(layer.rope.rotary, id(layer.rope.config)) for layer in layers}
    for module in model.modules():
        if (type(module), id(getattr(module, "config", None))) in rotaries:
            module.register_forward_pre_hook(functools.partial(_check_dimensions, model), with_kwargs=True)
            if "dynamic" in _rope_types(module).values():
                module.register_forward_hook(functools.partial(_check_growth, model))


def _rope_types(rotary: nn.Module) -> dict[str, str]:
    """Rope types by the prefix that their attributes have, which is empty where all layers have the same."""
    rope_type = getattr(rotary, "rope_type", None)
    return {f"{kind}_": value for kind, value in rope_type.items()} if isinstance(rope_type, dict) else {"": rope_type}


def unwatch_positions(model: nn.Module) -> None:
    """Undo [`watch_positions`]."""
    # Found by their function, because handles would not survive copies and pickles of the model.
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle_id, hook in list(hooks.items()):
                if getattr(hook, "func", hook) in (_check_prompt, _check_dimensions, _check_growth):
                    del hooks[handle_id]
                    module._forward_pre_hooks_with_kwargs.pop(handle_id, None)


def _mixes(model: nn.Module) -> bool:
    return any(isinstance(module, MixesAngles) and module.members() for module in model.modules())


def _check_prompt(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Refuse explicit position ids of prompts that the order of the keys does not give."""
    position_ids = kwargs.get("position_ids")
    # Continuous batching and flattened batches say by `cu_seq_lens_q` where sequences begin.
    if torch.compiler.is_compiling() or position_ids is None or "cu_seq_lens_q" in kwargs:
        return
    if position_ids.shape[-1] == 1 or not _mixes(model):
        return
    position_ids = position_ids[0] if position_ids.dim() == 3 else position_ids
    _check_steps(position_ids)
    cache, mask = find_cache(args, kwargs), kwargs.get("attention_mask")
    if cache is not None:
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            _check_padding(mask)
        _check_continuation(position_ids, cache, mask)


def _check_steps(position_ids: torch.Tensor) -> None:
    """Refuse position ids `[B, S]` that do not go up by one within a sequence."""
    step = position_ids.diff(dim=-1)
    gap = step > 1
    # Padding repeats a position too, but is not followed by the next one, or stands at the start at 0.
    repeated = (step[:, :-1] == 0) & (step[:, 1:] == 1) & (position_ids[:, 1:-1] > 0)
    bad = gap.any(dim=-1) | repeated.any(dim=-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"The position_ids of row {row} do not go up by one from token to token: "
            f"{position_ids[row].tolist()[:32]}. MoICE counts positions by the order of the keys. Leave "
            "`position_ids` out, or start every packed sequence at 0 and leave no gaps."
        )


def _check_padding(mask: torch.Tensor) -> None:
    """Refuse prompts padded on the right that are to be continued: later tokens would not follow the last real one."""
    ends_in_padding = (mask[:, -1] == 0) & mask.bool().any(dim=-1)
    if ends_in_padding.any():
        row = int(ends_in_padding.nonzero()[0])
        raise ValueError(
            f"Row {row} of the prompts is padded on the right, so the tokens to be generated would not stand right "
            'after its last token. Pad on the left: `tokenizer.padding_side = "left"`.'
        )


def _check_continuation(position_ids: torch.Tensor, cache: Cache, mask: object) -> None:
    """Refuse position ids `[B, S]` that do not follow the keys in the cache.

    The last positions that were looked at are noted on the cache, so that copies of it know as much.
    """
    past, first = int(cache.get_seq_length()), position_ids[:, 0]
    last, num_keys = getattr(cache, _NOTE, (None, 0))
    expected = None
    if past == 0:
        pass
    elif last is not None and len({last.shape[0], first.shape[0]} - {1}) <= 1:
        expected = last.to(first.device) + 1 + past - num_keys
    elif mask is None:
        expected = torch.full_like(first, past)
    elif isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[-1] > past:
        mask = mask.to(first.device)
        # Positions of padding mean nothing.
        expected = torch.where(mask[:, past] == 0, first, mask[:, :past].sum(dim=-1))
    if expected is not None and (expected != first).any():
        expected, first = torch.broadcast_tensors(expected, first)
        row = int((expected != first).nonzero()[0])
        raise ValueError(
            f"The position_ids of row {row} begin at {int(first[row])}, but after the keys in the cache comes "
            f"{int(expected[row])}. MoICE counts positions by the order of the keys. Leave `position_ids` out, or "
            "continue where the cache ends."
        )
    setattr(cache, _NOTE, (position_ids[:, -1], past + position_ids.shape[-1]))


def _check_dimensions(model: nn.Module, rotary: nn.Module, args: tuple, kwargs: dict) -> None:
    """Refuse positions that differ from dimension to dimension."""
    if torch.compiler.is_compiling():
        return
    position_ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() < 3 or position_ids.shape[-1] == 1:
        return
    differs = (position_ids != position_ids[:1]).any(dim=0).any(dim=-1)
    if _mixes(model) and differs.any():
        raise ValueError(
            f"Row {int(differs.nonzero()[0])} has positions in more than one dimension (mRoPE), as images and videos "
            "do. MoICE can only turn text positions: use text alone, or `disable_adapter()`."
        )


def _check_growth(model: nn.Module, rotary: nn.Module, args: tuple, output: object) -> None:
    """Refuse angles of the rope type dynamic that have grown beyond the original length.

    Transformers notes the length that the angles are made for: a number at first, a tensor once they have grown.
    """
    names = [f"{prefix}max_seq_len_cached" for prefix in _rope_types(rotary)]
    if any(isinstance(getattr(rotary, name, None), torch.Tensor) for name in names) and _mixes(model):
        raise ValueError(
            f"The angles of the rope type 'dynamic' have grown with a sequence beyond the model's original length of "
            f"{rotary.original_max_seq_len} tokens, and change with every token, while keys in the cache keep the old "
            f"ones. Keep below {rotary.original_max_seq_len} tokens, which also sets the angles back; use "
            "`disable_adapter()`, or give the model a rope type with fixed angles, such as 'linear' or 'yarn'."
        )
