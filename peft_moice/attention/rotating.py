"""Queries and keys under one expert, for implementations that rotate whole tensors."""

from collections.abc import Iterator

import torch

from ..rope import RotationTable, rotate
from .call import AttentionCall


def rotated_pairs(call: AttentionCall) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield queries `[B, H, S, D]` and keys `[B, G, T, D]` under each expert in turn; unchanged at the own angle.

    Where experts rotate far keys otherwise, this is how they rotate near ones.
    """
    far = call.rotations.far
    for expert, is_identity in enumerate(call.rotations.is_identity):
        factor = 1.0 if far is None else far.factors[expert]
        if is_identity and factor == 1.0:
            yield call.query, call.key
        else:
            yield turned_query(call, expert, factor), turned_keys(call, expert, call.key.shape[2])


def turned_query(
    call: AttentionCall, turn: int, factor: float = 1.0, start: int = 0, queries: slice = slice(None)
) -> torch.Tensor:
    """Some queries `[B, H, S, D]` under one rotation of the table, `start` before where they stand, times `factor`."""
    (cos, sin), _ = cos_sin(call, turn, start)
    cos, sin = cos[..., queries, :], sin[..., queries, :]
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return rotate(call.query[:, :, queries], cos, sin, call.rotations.layout)


def turned_keys(call: AttentionCall, turn: int, end: int) -> torch.Tensor:
    """The first `end` keys `[B, G, T, D]` under one rotation of the table."""
    if call.turned is not None and type(call.rotations) is RotationTable and not call.needs_gradients():
        return call.turned.upto(end, call.key, call.rotations, turn)
    _, (cos, sin) = cos_sin(call, turn)
    return rotate(call.key[:, :, :end], cos[..., :end, :], sin[..., :end, :], call.rotations.layout)


_Table = tuple[torch.Tensor, torch.Tensor]


def cos_sin(call: AttentionCall, turn: int, start: int = 0) -> tuple[_Table, _Table]:
    """Cosines and sines of one rotation of the table: of the queries, `start` before where they stand, and of the
    keys, each `[..., S or T, P]`. A query before `start` gets any."""
    device, num_queries = call.query.device, call.query.shape[-2]
    if call.query_positions is not None and call.key_positions is not None:
        # One row of positions holds for all heads.
        of_queries, of_keys = call.query_positions[:, None].to(device) - start, call.key_positions[:, None].to(device)
        return call.rotations.cos_sin_at(of_queries, turn), call.rotations.cos_sin_at(of_keys, turn)
    all_cos, all_sin = call.rotations.cos_sin(call.key.shape[-2], device)
    cos, sin = all_cos[turn], all_sin[turn]
    index: slice | torch.Tensor
    if isinstance(call.query_start, int) and call.query_start >= start:
        index = slice(call.query_start - start, call.query_start - start + num_queries)
    else:
        index = (call.query_start - start + torch.arange(num_queries, device=device)).clamp(min=0)
    return (cos[index], sin[index]), (cos, sin)
