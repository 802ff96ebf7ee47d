"""Queries and keys under one expert, for implementations that rotate whole tensors."""

from collections.abc import Iterator

import torch

from ..rope import rotate
from .call import AttentionCall


def rotated_pairs(call: AttentionCall) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield queries `[B, H, S, D]` and keys `[B, G, T, D]` under each expert in turn; unchanged at the own angle."""
    rotations = call.rotations
    if all(rotations.is_identity):
        for _ in rotations.is_identity:
            yield call.query, call.key
        return
    (query_cos, query_sin), (key_cos, key_sin) = _cos_sin(call)
    for expert, is_identity in enumerate(rotations.is_identity):
        if is_identity:
            yield call.query, call.key
        else:
            yield (
                rotate(call.query, query_cos[expert], query_sin[expert], rotations.layout),
                rotate(call.key, key_cos[expert], key_sin[expert], rotations.layout),
            )


_Table = tuple[torch.Tensor, torch.Tensor]


def _cos_sin(call: AttentionCall) -> tuple[_Table, _Table]:
    """Cosines and sines of the queries' positions, and of the keys', each `[N, ..., S or T, P]`."""
    device, num_queries = call.query.device, call.query.shape[-2]
    if call.query_positions is not None and call.key_positions is not None:
        # One row of positions holds for all heads.
        of_queries, of_keys = call.query_positions[:, None], call.key_positions[:, None]
        return call.rotations.cos_sin_at(of_queries.to(device)), call.rotations.cos_sin_at(of_keys.to(device))
    cos, sin = call.rotations.cos_sin(call.key.shape[-2], device)
    index: slice | torch.Tensor
    if isinstance(call.query_start, int):
        index = slice(call.query_start, call.query_start + num_queries)
    else:
        index = call.query_start + torch.arange(num_queries, device=device)
    return (cos[:, index], sin[:, index]), (cos, sin)
