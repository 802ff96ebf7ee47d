"""Where queries stand among the keys, in the coordinates of the key-value cache."""

import torch
from transformers.cache_utils import Cache


def find_cache(args: tuple, kwargs: dict) -> Cache | None:
    """The cache among an attention module's arguments, whatever the family calls it."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache):
            return value
    return None


def query_start(cache: Cache | None, query_length: int, layer_idx: int) -> int | torch.Tensor:
    """Index of the first query among the keys that the attention function will receive.

    Keys are numbered from 0 in the order in which they arrive, so query s stands at `query_start + s`. Only
    differences of positions matter to rotations; a constant shift of a row (left padding) cancels.

    Has to be called before the attention module runs: a static cache moves its length in place.

    Returns:
        An int, or a scalar tensor with a static cache.
    """
    if cache is None:
        return 0
    _, key_offset = cache.get_mask_sizes(query_length, layer_idx)
    return cache.get_query_offset(layer_idx) - key_offset
