"""Where queries stand among the keys, in the coordinates of the key-value cache."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.generation.continuous_batching import PagedAttentionCache


@dataclass(frozen=True)
class Positions:
    """Where the queries and keys of one pass stand.

    Attributes:
        query_start: see [`query_start`].
        query: `[B or 1, S]`, positions of queries that do not stand in the order of the keys, else None.
        key: `[B or 1, T]`, likewise for keys.
    """

    query_start: int | torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


def find_cache(args: tuple, kwargs: dict) -> Cache | None:
    """The key-value cache among the arguments of a model or an attention module, whatever they call it."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def paged_cache(args: tuple, kwargs: dict) -> PagedAttentionCache | None:
    """The cache of continuous batching among the arguments of a module or an attention function."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, PagedAttentionCache)), None)


def query_start(layer_idx: int, args: tuple, kwargs: dict) -> int | torch.Tensor | None:
    """Index of the first query among the keys that an attention function will receive.

    Keys are numbered from 0 in the order in which they arrive, so query s stands at `query_start + s`. Only
    differences of positions matter to rotations; a constant shift of a row (left padding) cancels.

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
    if cache is None or not any(isinstance(layer, StaticLayer) for layer in cache.layers):
        return None
    # Families that share an attention module among layers name the layer in the call.
    layer_idx = kwargs.get("layer_idx", layer_idx)
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
    return cache.get_query_offset(layer_idx) - key_offset


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
