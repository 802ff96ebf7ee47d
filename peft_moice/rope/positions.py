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

from .cache_note import CacheNote
from .order import Order, judge_order
from .told import ToldPositions, can_look, positions_told


@dataclass
class Positions:
    """What is known, before an attention module runs, of where the queries and keys of its pass stand.

    Attributes:
        ids: `[B or 1, S]`, positions of the queries, or None where they are not known.
        query_start: see [`query_start`].
        cache: the cache of this pass, or None.
        layer_idx: the module's index in it.
        past: in compiled code, the number of keys in the cache before this pass, an int or a scalar tensor.
        key_offset: in a static cache, the order of the first key that the attention function receives.
        note: the note on the cache, which holds the positions of this pass and those before.
        in_order: whether the order of keys is known to hold without looking any further.
        told: the positions as the rotary embedding got them.
        is_paged: whether this is a pass of continuous batching.
    """

    ids: torch.Tensor | None = None
    query_start: int | torch.Tensor | None = None
    cache: Cache | None = None
    layer_idx: int = 0
    past: int | torch.Tensor = 0
    key_offset: int | None = None
    note: CacheNote | None = None
    in_order: bool = False
    told: ToldPositions | None = None
    is_paged: bool = False

    def resolve(
        self, batch: int, num_queries: int, num_keys: int, attention_mask: Any
    ) -> tuple[int | torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Index of the first query among the keys, and where needed the positions of queries and keys.

        Waits for the device at passes of several tokens, and not at single tokens of sequences that count up.

        Args:
            batch: B.
            num_queries: S.
            num_keys: T, the number of keys that the attention function receives.
            attention_mask: what it receives as a mask.

        Returns:
            The index, positions of the queries `[B or 1, S]` and of the keys `[B or 1, T]`; these are None where the
            order of the keys gives every difference of positions that attention reads.

        Raises:
            ValueError: tokens do not count up, and the positions of keys in the cache are not known.
        """
        start = num_keys - num_queries if self.query_start is None else self.query_start
        if self.ids is None or self.in_order:
            return start, None, None
        keys = self._key_positions(num_keys, num_queries, attention_mask)
        note = self.note
        if note is not None and note.in_order is False and not can_look(self.ids):
            order = Order(False, False)
        else:
            order = self._order(keys, int(start), batch, attention_mask)
            if note is not None:
                note.judged(order.continues)
        if order.holds:
            return start, None, None
        if keys is None or (note is not None and note.is_guess):
            raise ValueError(
                f"The position_ids {_shown(self.ids)} do not count up from the keys in the cache, and MoICE cannot "
                "tell where those stand: it did not see them come, or the rows of the batch have changed since. Run "
                "the whole sequence through the adapted model with a cache of its own, or leave `position_ids` out."
            )
        return start, self.ids, keys

    def _key_positions(self, num_keys: int, num_queries: int, mask: Any) -> torch.Tensor | None:
        """Positions `[B or 1, T]` of the keys that the attention function received; None if they are not known."""
        assert self.ids is not None
        if self.note is None:
            return self.ids if num_keys == num_queries else None
        total = self.note.num_keys
        offset = total - num_keys if self.key_offset is None else self.key_offset
        return self.note.positions_of_keys(offset, num_keys, mask) if offset >= 0 else None

    def _order(self, keys: torch.Tensor | None, start: int, batch: int, mask: Any) -> Order:
        assert self.ids is not None and self.told is not None
        num_keys = None if keys is None else keys.shape[-1]
        place = (start, num_keys)
        for known_mask, known_place, order in self.told.orders:
            if known_mask is mask and known_place == place:
                return order
        order = judge_order(self.ids, keys, start, batch, mask)
        self.told.orders.append((mask, place, order))
        return order

    def span(self) -> tuple[int, int] | None:
        """The smallest and the greatest position of a query of this pass; None in compiled code.

        Waits for the device once per pass.
        """
        if torch.compiler.is_compiling() or self.ids is None or self.told is None:
            return None
        if self.told.span is None:
            smallest, greatest = self.ids.aminmax()
            self.told.span = (int(smallest), int(greatest))
        return self.told.span

    def of_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Positions `[B or 1, S]` of queries `[B, H, S, D]`: those that were told, else the order of the keys.

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
        return (self.query_start or 0) + torch.arange(query.shape[-2], device=query.device)[None]

    def refuse_several_dimensions(self) -> None:
        """Raise a ValueError if the positions of a token differ from dimension to dimension (mRoPE)."""
        told = self.told
        if (
            torch.compiler.is_compiling()
            or self.ids is None
            or told is None
            or told.ids.dim() < 3
            or told.is_text
            or not can_look(self.ids)
        ):
            return
        differs = (told.ids != told.ids[:1]).any(dim=0).any(dim=-1)
        told.is_text = not bool(differs.any())
        if not told.is_text:
            raise ValueError(
                f"Row {int(differs.nonzero()[0])} has positions in more than one dimension (mRoPE), as images and "
                "videos do. MoICE can only rotate text positions: use text alone, or `disable_adapter()`."
            )


def positions_of_pass(
    layer_idx: int | None, args: tuple[Any, ...], kwargs: dict[str, Any], mixes: bool = True
) -> Positions:
    """Where the tokens of this pass stand; notes it on the cache, if there is one.

    Has to be called before the attention module runs (a static cache moves its length in place), and in passes that
    mix no angles too.

    Args:
        layer_idx: the attention module's own index in the cache.
        args, kwargs: the module's arguments.
        mixes: whether angles are mixed in this pass; if not, nothing is refused.

    Raises:
        ValueError: positions of several dimensions that differ (mRoPE); tokens that do not count up from keys in the
            cache whose positions are not known; a static cache whose layer for this module cannot be told; compiled
            code that goes on with a cache whose keys do not count up.
    """
    told, (cache, paged) = positions_told(args, kwargs), _caches(args, kwargs)
    batch, num_queries = (args[0] if args else kwargs["hidden_states"]).shape[:2]
    ids = None if told is None else told.of_tokens(batch, num_queries)
    positions = Positions(ids, cache=cache, told=told, is_paged=paged is not None)
    positions.in_order = torch.compiler.is_compiling()
    if mixes:
        positions.refuse_several_dimensions()
    # Families that share an attention module among layers name the layer in the call.
    layer_idx = kwargs.get("layer_idx", layer_idx)
    if cache is None or layer_idx is None:
        return positions
    positions.layer_idx = layer_idx
    if mixes:
        positions.query_start, positions.key_offset = _static_place(layer_idx, args, kwargs, cache)
    if torch.compiler.is_compiling():
        if mixes:
            CacheNote.refuse_compiled(cache)
        positions.past = cache.get_seq_length(positions.layer_idx)
        return positions
    note = positions.note = CacheNote.on(cache)
    past = note.num_past(cache, positions.layer_idx, num_queries, told)
    if ids is None or told is None:
        note.lose_track(past + num_queries)
    else:
        note.add(ids, past, batch, told)
        positions.in_order = note.continues
    if mixes and past > 0 and not positions.in_order:
        # What has to be refused is refused before the cache takes keys up.
        num_keys, _ = cache.get_mask_sizes(num_queries, positions.layer_idx)
        positions.resolve(batch, num_queries, num_keys, _find_mask(args, kwargs))
    return positions


def _find_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention mask among an attention module's arguments."""
    if "attention_mask" in kwargs:
        return kwargs["attention_mask"]
    return next((value for value in args if isinstance(value, torch.Tensor) and value.dim() == 4), None)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The key-value cache among the arguments of a model or an attention module, whatever they call it."""
    return _caches(args, kwargs)[0]


def paged_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PagedAttentionCache | None:
    """The cache of continuous batching among the arguments of a module or an attention function."""
    return _caches(args, kwargs)[1]


def _caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Cache | None, PagedAttentionCache | None]:
    """The first key-value cache and the first one of continuous batching among the arguments."""
    cache = paged = None
    for value in (*kwargs.values(), *args):
        if not isinstance(value, (Cache, EncoderDecoderCache, PagedAttentionCache)):
            continue
        if isinstance(value, PagedAttentionCache):
            paged = value if paged is None else paged
        elif cache is None:
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    return cache, paged


def query_start(layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | torch.Tensor | None:
    """Index of the first query among the keys that an attention function will receive.

    Keys are numbered from 0 in the order in which they arrive, so query s stands at `query_start + s`.

    Has to be called before the attention module runs: a static cache moves its length in place.

    Args:
        layer_idx: the attention module's own index in the cache.
        args, kwargs: the module's arguments.

    Returns:
        None where the queries belong to the last keys, that is without a cache and with any cache that grows. With a
        static cache, whose keys end in unused places, an int or a scalar tensor.

    Raises:
        ValueError: a static cache whose layer for this module cannot be told.
    """
    cache = find_cache(args, kwargs)
    return None if cache is None else _static_place(layer_idx, args, kwargs, cache)[0]


def _static_place(
    layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Cache
) -> tuple[int | torch.Tensor | None, int | None]:
    """In a static cache, the index of the first query among the keys, and the order of the first key; else None."""
    layer_idx = kwargs.get("layer_idx", layer_idx)
    own = cache.layers[layer_idx : layer_idx + 1] or cache.layers
    if not any(isinstance(layer, StaticLayer) for layer in own):
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
    """Like [`query_start`], for sequences that lie one after the other in one row, each with its own past.

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


def _shown(ids: torch.Tensor) -> str:
    return f"{ids[:4, :32].tolist()}"
