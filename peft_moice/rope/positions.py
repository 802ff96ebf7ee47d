"""Where the queries and keys of one pass stand.

Only differences of positions matter to rotations. Where every row counts up by one, as plain, left-padded and packed
rows do, the order of the keys gives those differences, and nothing but the index of the first query is needed. Other
positions are taken from what the model's rotary embedding was given, and for keys in a cache from the note on it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.generation.continuous_batching import PagedAttentionCache

from .given_positions import GivenPositions, can_look, given_positions
from .key_order import judge_order
from .noted_keys import NotedKeys


@dataclass
class Positions:
    """What is known, before an attention module runs, of where the queries and keys of its pass stand.

    Attributes:
        ids: `[B or 1, S]`, positions of the queries, or None where they are not known.
        keys: `[B or 1, T]`, positions of the keys; None where the order of the keys gives every difference of
            positions that attention reads.
        query_start: in a static cache, whose keys end in unused places, the index of the first query among the keys,
            an int or a scalar tensor. None where the queries belong to the last keys.
        cache: the cache of this pass, or None.
        layer_idx: the module's index in it.
        past: in compiled code, the number of keys in the cache before this pass, an int or a scalar tensor.
        note: the note on the cache, which holds the positions of this pass and those before.
        is_paged: whether this is a pass of continuous batching.
        given: the positions as the rotary embedding got them, if they are those of the queries.
    """

    ids: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    query_start: int | torch.Tensor | None = None
    cache: Cache | None = None
    layer_idx: int = 0
    past: int | torch.Tensor = 0
    note: NotedKeys | None = None
    is_paged: bool = False
    given: GivenPositions | None = None

    def among_keys(
        self, num_queries: int, num_keys: int
    ) -> tuple[int | torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Index of the first query among the keys, and where needed the positions of queries and keys.

        Args:
            num_queries: S.
            num_keys: T, the number of keys that the attention function received.

        Returns:
            The index, positions of the queries `[B or 1, S]` and of the keys `[B or 1, T]`; these are None where the
            order of the keys is enough.

        Raises:
            ValueError: tokens do not count up, and there are keys whose positions are not known.
        """
        start = num_keys - num_queries if self.query_start is None else self.query_start
        if self.keys is None or self.ids is None:
            return start, None, None
        if self.keys.shape[-1] < num_keys:
            raise _unknown_keys(self.ids)
        return start, self.ids, self.keys[:, -num_keys:]

    def leave(self) -> None:
        """Note what the pass left in its cache. To be called after the attention module has run."""
        if self.note is not None and self.cache is not None:
            self.note.leave(self.cache, self.layer_idx)

    def extent(self) -> tuple[int, int] | None:
        """The least and the greatest position of a query of this pass; None where they are not known, and in compiled
        code. Waits for the device once per pass."""
        return None if self.given is None or torch.compiler.is_compiling() else self.given.extent()

    def rows_between(self, first: int, end: int | None) -> slice | None:
        """The queries among which are all at positions from `first` to `end`; None as for [`extent`]."""
        return None if self.given is None or torch.compiler.is_compiling() else self.given.rows_between(first, end)

    def of_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Positions `[B or 1, S]` of queries `[B, H, S, D]`: those that were given, else the order of the keys.

        Raises:
            ValueError: neither is known.
        """
        if self.ids is not None:
            return self.ids.to(query.device)
        if self.cache is not None and self.query_start is None:
            raise ValueError(
                "The positions of this pass did not reach the attention layer, so the ropes of its queries cannot be "
                "told. Give the model `position_ids`, or run without compilation."
            )
        start = 0 if self.query_start is None else self.query_start
        return start + torch.arange(query.shape[-2], device=query.device)[None]


def positions_of_pass(
    layer_idx: int | None, args: tuple[Any, ...], kwargs: dict[str, Any], mixes: bool = True
) -> Positions:
    """Where the tokens of this pass stand; notes it on the cache, if there is one.

    Has to be called before the attention module runs (a static cache moves its length in place, and what is refused is
    refused before the cache takes keys up), and in passes that mix no angles too. Waits for the device at passes of
    several tokens, and not at single tokens of sequences that count up.

    Args:
        layer_idx: the attention module's own index in the cache.
        args, kwargs: the module's arguments.
        mixes: whether angles are mixed in this pass; if not, nothing is refused.

    Raises:
        ValueError: positions of several dimensions that differ (mRoPE); tokens that do not count up from keys in the
            cache whose positions are not known; a static cache whose layer for this module cannot be told; compiled
            code that goes on with a cache whose keys do not count up.
    """
    is_compiling = torch.compiler.is_compiling()
    given, (cache, paged) = given_positions(args, kwargs, is_compiling), caches_among(args, kwargs)
    batch, num_queries = (args[0] if args else kwargs["hidden_states"]).shape[:2]
    ids = None if given is None else given.of_tokens(batch, num_queries)
    positions = Positions(ids, cache=cache, is_paged=paged is not None, given=None if ids is None else given)
    if mixes and given is not None and ids is not None and not is_compiling:
        given.refuse_several_dimensions()
    # Families that share an attention module among layers name the layer in the call.
    layer_idx = kwargs.get("layer_idx", layer_idx)
    key_offset = None
    if cache is not None and layer_idx is not None:
        positions.layer_idx = layer_idx
        if mixes:
            positions.query_start, key_offset = _static_place(layer_idx, args, kwargs, cache)
        if is_compiling:
            if mixes:
                NotedKeys.refuse_compiled(cache)
            positions.past = cache.get_seq_length(layer_idx)
            return positions
        note = positions.note = NotedKeys.on(cache)
        positions.past = note.begin(cache, layer_idx, (batch, num_queries), ids, given)
    counts_on = is_compiling or (positions.note is not None and positions.note.continues)
    if mixes and given is not None and ids is not None and not counts_on:
        positions.keys = _keys_out_of_order(positions, given, batch, key_offset, _find_mask(args, kwargs))
    return positions


def _keys_out_of_order(
    positions: Positions, given: GivenPositions, batch: int, key_offset: int | None, mask: Any
) -> torch.Tensor | None:
    """Positions `[B or 1, T]` of the keys that the attention function will receive, where their order is not enough.

    In a static cache, `key_offset` is the number of the first of those keys.
    """
    ids, note, past = positions.ids, positions.note, positions.past
    assert ids is not None
    keys, start = ids, 0
    if note is not None:
        assert positions.cache is not None and isinstance(past, int)
        num_keys, total = note.num_keys, note.num_keys
        if positions.layer_idx < len(positions.cache.layers):
            num_keys = positions.cache.get_mask_sizes(ids.shape[-1], positions.layer_idx)[0]
        if key_offset is None:
            # Layers that come more than once in a pass find their keys in the cache already.
            num_keys = min(num_keys, total)
            key_offset = total - num_keys
        keys, start = note.positions_of_keys(key_offset, num_keys, mask), past - key_offset
    if note is None or note.counted != 0 or can_look(ids):
        order = given.order_of(mask, (start, keys.shape[-1]), lambda: judge_order(ids, keys, start, batch, mask))
        if note is not None:
            note.judged(order.continues)
        if order.holds:
            return None
    if note is not None and note.is_guess:
        raise _unknown_keys(ids)
    return keys


def _unknown_keys(ids: torch.Tensor) -> ValueError:
    return ValueError(
        f"The position_ids {ids[:4, :32].tolist()} do not count up from the keys in the cache, and MoICE cannot "
        "tell where those stand: it did not see them come, they were taken out, moved or written by others, or the "
        "rows of the batch have changed since. Run the whole sequence through the adapted model with a cache of its "
        "own, or leave `position_ids` out if its keys count up from 0."
    )


def _find_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention mask among an attention module's arguments."""
    if "attention_mask" in kwargs:
        return kwargs["attention_mask"]
    return next((value for value in args if isinstance(value, torch.Tensor) and value.dim() == 4), None)


def caches_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Cache | None, PagedAttentionCache | None]:
    """The first key-value cache and the first one of continuous batching among the arguments of a model, an attention
    module or an attention function, whatever they call them."""
    cache = paged = None
    for value in (*kwargs.values(), *args):
        if not isinstance(value, (Cache, EncoderDecoderCache, PagedAttentionCache)):
            continue
        if isinstance(value, PagedAttentionCache):
            paged = value if paged is None else paged
        elif cache is None:
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    return cache, paged


def _static_place(
    layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Cache
) -> tuple[int | torch.Tensor | None, int | None]:
    """In a static cache, the index of the first query among the keys, and the number of the first key; else None."""
    for layer in cache.layers[layer_idx : layer_idx + 1] or cache.layers:
        if isinstance(layer, StaticLayer):
            break
    else:
        return None, None
    # Some families hand the language model's own `logits_to_keep` down to their layers.
    offsets = [
        name for name, value in kwargs.items() if type(value) is int and name not in ("layer_idx", "logits_to_keep")
    ]
    if offsets or layer_idx >= len(cache.layers):
        reason = f"`{offsets[0]}` chooses among several of its layers" if offsets else "it lends keys to this layer"
        raise ValueError(
            f"MoICE cannot tell the positions of attention layer {layer_idx} in a static cache: {reason}. Use a "
            "DynamicCache, transformers' default."
        )
    query_length = (args[0] if args else kwargs["hidden_states"]).shape[-2]
    _, key_offset = cache.get_mask_sizes(query_length, layer_idx)
    return cache.get_query_offset(layer_idx) - key_offset, key_offset


def packed_query_start(
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Index of the first query among the keys, where sequences with pasts of their own lie in one row.

    Args:
        cu_seq_lens_q: `[sequences + 1]`, where each sequence's queries begin, and where the last one's end.
        cu_seq_lens_k: `[sequences + 1]`, the same for keys. The queries of a sequence belong to its last keys.
        query: `[1, H, S, D]`; what lies behind the last sequence is padding.
        key: `[1, G, T, D]`.

    Returns:
        `[S]`, so that query s stands at `query_start[s] + s`.
    """
    order = torch.arange(query.shape[-2], device=query.device)
    sequence = torch.bucketize(order, cu_seq_lens_q[1:], right=True).clamp(max=cu_seq_lens_q.shape[0] - 2)
    from_end = cu_seq_lens_q[sequence + 1] - order
    return (cu_seq_lens_k[sequence + 1] - from_end).clamp(0, key.shape[-2] - 1) - order
