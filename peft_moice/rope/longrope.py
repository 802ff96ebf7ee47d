"""Longrope: which of its two sets of angles a pass uses.

Up to its original length such a model rotates queries and keys by its short factors, beyond it by its long ones: two
rotary embeddings, each as fixed as any. Transformers chooses between them in every pass, by the highest position in
the batch, and leaves the keys in a cache as they are. A sequence that grows beyond the original length in the middle
has keys of both kinds, which no further rotation can make agree; it is refused.

Where queries have ropes by their positions, the rotary embedding is held at its short factors ([`rotary_hooks`]), so
that all keys carry these, and sequences may grow.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .layer_rope import LayerRope
from .noted_keys import NotedKeys
from .positions import Positions


@dataclass
class _Factors:
    """What is known of the factors that the keys in a cache carry.

    Attributes:
        kind: "short", "long", or "both" where the base model went on beyond the original length.
        shift: the highest position minus that of the last key in the order of keys; below zero in padded batches.
        position_ids: those of the pass that this was noted in.
        num_keys: after that pass.
    """

    kind: str
    shift: int
    position_ids: torch.Tensor
    num_keys: int


def rope_of_pass(rope: LayerRope, positions: Positions, mixes: bool = True, is_held: bool = False) -> LayerRope:
    """`rope` under the factors that the model uses in this pass; with other rope types, `rope` as it is.

    Waits for the device at prompts that fill a cache, not at single tokens, and not without a cache. Where the pass
    mixes no angles, nothing is refused; `is_held` says that the model uses its short factors at any length.

    Raises:
        ValueError: keys in the cache carry other factors than the model uses now, or it cannot be told whether.
    """
    if rope.original_length is None:
        return rope
    if positions.ids is None:
        if is_held or not mixes:
            return rope
        raise ValueError(
            "The positions of this pass did not reach the attention layer, so MoICE cannot tell which factors of the "
            "rope type 'longrope' the model uses. Run without compilation, remove the adapter, or choose a rope type "
            "with fixed angles."
        )
    if mixes and positions.is_paged and not is_held:
        raise ValueError(
            "With the rope type 'longrope', continuous batching rotates the keys of all sequences by the factors that "
            "suit the longest one, and MoICE cannot tell which keys in the cache carry which. Use `generate`."
        )
    is_long: bool | torch.Tensor | None = None
    if positions.cache is not None:
        # After a graph break, plain Python may go on with what compiled code began.
        watch = _watch_compiled if torch.compiler.is_compiling() or positions.note is None else _watch
        is_long = watch(positions, rope.original_length, mixes, is_held)
    if is_held:
        return rope
    is_long = positions.ids.max() >= rope.original_length if is_long is None else is_long
    return replace(rope, is_long=is_long)  # which shares its tables


def _watch(positions: Positions, original_length: int, mixes: bool, is_held: bool) -> bool:
    """Whether this pass uses the long factors, after comparing them with those of the keys in the cache."""
    cache, ids = positions.cache, positions.ids
    assert cache is not None and ids is not None and positions.note is not None
    noted = positions.note.longrope
    before: _Factors | None = noted.get(original_length)
    num_queries, past = ids.shape[-1], cache.get_seq_length(positions.layer_idx)
    on_device = isinstance(past, torch.Tensor)
    # Another layer has seen to this pass. (Layers without a place in the cache borrow the keys of others.)
    if (
        before is not None
        and before.position_ids is ids
        and (on_device or past + num_queries == before.num_keys or positions.layer_idx >= len(cache.layers))
    ):
        return before.kind != "short"
    if before is not None and num_queries == 1 and on_device:
        return _watch_static(positions, original_length, before, mixes, is_held)

    past = int(past)
    if before is None or num_queries > 1:
        length = int(ids.max()) + 1
        shift = length - (past + num_queries)
    else:
        shift = before.shift
        length = past + num_queries + shift
    kind = "long" if length > original_length and not is_held else "short"
    if past > 0:
        kind_before = "long" if length - num_queries > original_length else "short"
        kind_before = kind_before if before is None else before.kind
        if kind_before != kind:
            if mixes:
                raise ValueError(_disagreement(kind_before, kind, original_length))
            kind = "both"
    now = noted[original_length] = _Factors(kind, shift, ids, past + num_queries)
    if on_device:
        _watch_static(positions, original_length, now, mixes, is_held)
    return kind != "short"


def _watch_static(positions: Positions, original_length: int, factors: _Factors, mixes: bool, is_held: bool) -> bool:
    """As [`_watch`], where the device alone knows how many keys there are: none may be able to outgrow its factors."""
    assert positions.cache is not None
    if mixes and factors.kind in ({"both", "long"} if is_held else {"both"}):
        raise ValueError(_disagreement(factors.kind, "short" if is_held else "long", original_length))
    capacity = _capacity(positions)
    if mixes and not is_held and factors.kind == "short" and capacity + factors.shift > original_length:
        raise ValueError(
            f"A static cache of {capacity} places can outgrow the model's original length of {original_length} "
            "tokens unseen, where the rope type 'longrope' changes to its long factors while keys in the cache keep "
            f"the short ones. Make it {original_length} places long, or use a DynamicCache, transformers' default."
        )
    return factors.kind != "short"


def _watch_compiled(positions: Positions, original_length: int, mixes: bool, is_held: bool) -> bool | None:
    """As [`_watch`], by what can be told without looking at the device; None where only the device knows."""
    cache, ids, past = positions.cache, positions.ids, positions.past
    assert cache is not None and ids is not None
    note = NotedKeys.of(cache)
    before: _Factors | None = None if note is None else note.longrope.get(original_length)
    if isinstance(past, torch.Tensor):
        if before is not None:
            return _watch_static(positions, original_length, before, mixes, is_held)
        fits = _capacity(positions) <= original_length
    else:
        length = past + ids.shape[-1]
        if before is not None:
            kind = "long" if length + before.shift > original_length and not is_held else "short"
            if mixes and past > 0 and kind != before.kind:
                raise ValueError(_disagreement(before.kind, kind, original_length))
            return None if past == 0 else kind == "long"
        fits = past == 0 or length <= original_length
    if mixes and not fits:
        raise ValueError(
            "Compiled code cannot tell whether keys in a cache carry the short or the long factors of the rope type "
            "'longrope'. Run the prompt, which fills the cache, without compilation."
        )
    return None


def _capacity(positions: Positions) -> int:
    """Number of places in this layer of a static cache."""
    assert positions.cache is not None
    layer: Any = positions.cache.layers[positions.layer_idx]
    capacity: int = layer.max_cache_len
    return capacity


def _disagreement(before: str, now: str, original_length: int) -> str:
    kind = "both kinds" if before == "both" else f"the {before} ones"
    return (
        f"The model uses the {now} factors of the rope type 'longrope' in this pass, but keys in the cache carry "
        f"{kind}: the sequence has crossed the model's original length of {original_length} tokens, and its angles no "
        "longer agree (in the base model, too). Run the whole sequence again without its cache, keep within "
        f"{original_length} tokens, or begin with a longer prompt."
    )
