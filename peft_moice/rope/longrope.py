"""Longrope: which of its two sets of angles a pass uses.

Up to its original length such a model turns queries and keys by its short factors, beyond it by its long ones: two
rotary embeddings, each as fixed as any. Transformers chooses between them in every pass, by the highest position in
the batch, and leaves the keys in a cache as they are. A sequence that grows beyond the original length in the middle
has keys of both kinds, which no further rotation can make agree; it is refused.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from .layer_rope import LayerRope
from .positions import find_cache, paged_cache

_NOTES = "_moice_longrope"


@dataclass
class _Note:
    """What is known of the keys in a cache. It lies on the cache, so that copies of the cache know as much.

    Attributes:
        factors: "short", "long", or "both" where the base model went on beyond the original length.
        shift: the highest position minus that of the last key in the order of keys; below zero in padded batches.
        position_ids: those of the pass that this was noted in.
        num_keys: after that pass.
    """

    factors: str
    shift: int
    position_ids: torch.Tensor
    num_keys: int


def rope_of_pass(rope: LayerRope, layer_idx: int, args: tuple, kwargs: dict, mixes: bool = True) -> LayerRope:
    """`rope` under the factors that the model uses in this pass; with other rope types, `rope` as it is.

    Waits for the device at prompts that fill a cache, not at single tokens, and not without a cache.

    Args:
        rope: the layer's rotary embedding.
        layer_idx: the attention module's own index in the cache.
        args, kwargs: the module's arguments.
        mixes: whether angles are mixed in this pass; if not, nothing is refused.

    Raises:
        ValueError: keys in the cache carry other factors than the model uses now, or it cannot be told whether.
    """
    if rope.original_length is None:
        return rope
    position_ids = kwargs.get("position_ids")
    if not isinstance(position_ids, torch.Tensor):
        if not mixes:
            return rope
        raise ValueError(
            "The model does not give `position_ids` to its attention layers, so MoICE cannot tell which factors of "
            "the rope type 'longrope' it uses. Remove the adapter, or choose a rope type with fixed angles."
        )
    if mixes and paged_cache(args, kwargs) is not None:
        raise ValueError(
            "With the rope type 'longrope', continuous batching turns the keys of all sequences by the factors that "
            "suit the longest one, and MoICE cannot tell which keys in the cache carry which. Use `generate`."
        )
    cache = find_cache(args, kwargs)
    is_long = None
    if cache is not None:
        layer_idx = kwargs.get("layer_idx", layer_idx)
        watch = _watch_compiled if torch.compiler.is_compiling() else _watch
        is_long = watch(cache, layer_idx, rope.original_length, position_ids, mixes)
    return rope.with_factors(position_ids.max() >= rope.original_length if is_long is None else is_long)


def _watch(cache: Cache, layer_idx: int, original_length: int, position_ids: torch.Tensor, mixes: bool) -> bool:
    """Whether this pass uses the long factors, after comparing them with those of the keys in the cache."""
    notes = vars(cache).setdefault(_NOTES, {})
    note: _Note | None = notes.get(original_length)
    num_queries, past = position_ids.shape[-1], cache.get_seq_length(layer_idx)
    on_device = isinstance(past, torch.Tensor)
    # Another layer has seen to this pass. (Layers without a place in the cache borrow the keys of others.)
    if (
        note is not None
        and note.position_ids is position_ids
        and (on_device or past + num_queries == note.num_keys or layer_idx >= len(cache.layers))
    ):
        return note.factors != "short"
    if note is not None and num_queries == 1 and on_device:
        return _watch_static(cache, layer_idx, original_length, note, mixes)

    past = int(past)
    if note is None or num_queries > 1:
        length = int(position_ids.max()) + 1
        shift = length - (past + num_queries)
    else:
        shift = note.shift
        length = past + num_queries + shift
    factors = "long" if length > original_length else "short"
    if past > 0:
        before = "long" if length - num_queries > original_length else "short"
        before = before if note is None else note.factors
        if before != factors:
            if mixes:
                raise ValueError(_disagreement(before, factors, original_length))
            factors = "both"
    note = notes[original_length] = _Note(factors, shift, position_ids, past + num_queries)
    if on_device:
        _watch_static(cache, layer_idx, original_length, note, mixes)
    return factors != "short"


def _watch_static(cache: Cache, layer_idx: int, original_length: int, note: _Note, mixes: bool) -> bool:
    """As [`_watch`], where the device alone knows how many keys there are: none may be able to outgrow its factors."""
    if mixes and note.factors == "both":
        raise ValueError(_disagreement("both", "long", original_length))
    capacity = cache.layers[layer_idx].max_cache_len
    if mixes and note.factors == "short" and capacity + note.shift > original_length:
        raise ValueError(
            f"A static cache of {capacity} places can outgrow the model's original length of {original_length} "
            "tokens unseen, where the rope type 'longrope' changes to its long factors while keys in the cache keep "
            f"the short ones. Make it {original_length} places long, or use a DynamicCache, transformers' default."
        )
    return note.factors != "short"


def _watch_compiled(
    cache: Cache, layer_idx: int, original_length: int, position_ids: torch.Tensor, mixes: bool
) -> bool | None:
    """As [`_watch`], by what can be told without looking at the device; None where only the device knows."""
    note: _Note | None = getattr(cache, _NOTES, {}).get(original_length)
    past = cache.get_seq_length(layer_idx)
    if isinstance(past, torch.Tensor):
        if note is not None:
            return _watch_static(cache, layer_idx, original_length, note, mixes)
        fits = cache.layers[layer_idx].max_cache_len <= original_length
    else:
        length = past + position_ids.shape[-1]
        if note is not None:
            factors = "long" if length + note.shift > original_length else "short"
            if mixes and past > 0 and factors != note.factors:
                raise ValueError(_disagreement(note.factors, factors, original_length))
            return None if past == 0 else factors == "long"
        fits = past == 0 or length <= original_length
    if mixes and not fits:
        raise ValueError(
            "Compiled code cannot tell whether keys in a cache carry the short or the long factors of the rope type "
            "'longrope'. Run the prompt, which fills the cache, without compilation."
        )
    return None


def _disagreement(before: str, now: str, original_length: int) -> str:
    kind = "both kinds" if before == "both" else f"the {before} ones"
    return (
        f"The model uses the {now} factors of the rope type 'longrope' in this pass, but keys in the cache carry "
        f"{kind}: the sequence has crossed the model's original length of {original_length} tokens, and its angles no "
        "longer agree (in the base model, too). Run the whole sequence again without its cache, keep within "
        f"{original_length} tokens, or begin with a longer prompt."
    )
