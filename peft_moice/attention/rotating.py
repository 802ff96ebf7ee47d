"""Queries and keys under one expert, for implementations that rotate whole tensors."""

from collections.abc import Iterator

import torch

from ..rope import RotationTable, rotate


def rotated_pairs(
    query: torch.Tensor, key: torch.Tensor, rotations: RotationTable, query_start: int | torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `query` `[B, H, S, D]` and `key` `[B, G, T, D]` under each expert in turn; unchanged at the own angle.

    Raises:
        ValueError: there are fewer keys than positions, so keys and positions cannot correspond one to one.
    """
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if isinstance(query_start, int):
        if query_start + num_queries > num_keys:
            raise ValueError(
                f"{num_queries} queries starting at position {query_start} do not fit {num_keys} keys: the cache "
                "keeps keys in a layout whose positions cannot be told. Use one of transformers' own caches."
            )
        query_index = slice(query_start, query_start + num_queries)
    else:
        query_index = query_start + torch.arange(num_queries, device=query.device)
    if all(rotations.is_identity):
        cos = sin = None
    else:
        cos, sin = rotations.cos_sin(num_keys, query.device)
    for expert, is_identity in enumerate(rotations.is_identity):
        if is_identity:
            yield query, key
        else:
            yield (
                rotate(query, cos[expert, query_index], sin[expert, query_index], rotations.layout),
                rotate(key, cos[expert], sin[expert], rotations.layout),
            )
