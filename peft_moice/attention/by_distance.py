"""The model's own attention for some queries, under a rope that may change with the distance of the key.

All keys share one softmax. A head of twice the size holds both rotations of a query, `[near, far]`, and meets every
key under one of them, `[k, 0]` or `[0, k]`. So each key is scored once, by whatever function the model has. Queries go
block by block, which keeps masks small. A single query needs none of that: its far keys are turned towards it. Where
log-sum-exps are at hand, near and far keys are parts of one softmax instead, at the model's own head size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..rope import rotate
from ..rope.rotation import NEVER
from .call import AttentionCall, why_not_now
from .joined import Operator, Part, attend, operator_of
from .rotating import turned_keys, turned_query

_BLOCK = 512
"""Queries of a call. Up to so many keys, those around the border, are met under both rotations."""
_READ_MASKS = ("eager", "sdpa")
"""Backends whose functions take a mask of four dimensions."""


class _Block(NamedTuple):
    """Some queries, and the keys that may be near or far to them."""

    queries: slice
    near: slice
    far: slice


def why_not(call: AttentionCall) -> str | None:
    """Why attention by distance cannot be computed for `call`, or None."""
    if call.backend is not None and call.backend not in _READ_MASKS:
        reason = call.why_not_plain(any_mask=True, any_positions=True)
        return None if reason is None else f"the backend {call.backend!r} takes no masks, and in its place {reason}"
    mask = call.attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 4):
        return f"it reads masks of four dimensions, not a {type(mask).__name__}"
    if call.query_positions is None and isinstance(call.query_start, torch.Tensor) and call.query_start.dim() > 0:
        return "it reads one position for the first query, and packed sequences have one for each"
    return None


def attend_by_distance(
    call: AttentionCall, expert: int, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the rows of `call` that may pick an expert, under that.

    Args:
        call: the call; [`why_not`] has nothing against it.
        expert: index of the expert.
        query: `[B, H, S, D]` under the expert's rotation of near keys.
        key: `[B, G, T, D]`, likewise.

    Returns:
        The output `[B, S, H, Dv]`, and the probabilities `[B, H, S, T]` where the model's attention gives them; zeros
        in the other rows.
    """
    operator = _operator_of_parts(call, expert)
    if operator is not None:
        return _in_rows(call, expert, _attend_in_parts(call, expert, query, key, operator)), None
    if call.query.shape[2] == 1:
        return call.run_attend(query, _towards_query(call, expert, key))
    near_keys, far_keys, queries = key, key[:, :, :0], query
    if _start(call, expert) < NEVER:
        far_query, far_key = far_pair(call, expert)
        queries = torch.cat((query, far_query), dim=-1)
        near_keys, far_keys = pad(key, (0, far_key.shape[-1])), pad(far_key, (key.shape[-1], 0))
    attend, mask_of = _attend_of(call), _mask_of(call, expert)
    outputs, all_probs = [], []
    for block in _blocks(call, expert):
        keys = torch.cat((far_keys[:, :, block.far], near_keys[:, :, block.near]), dim=2)
        values = torch.cat((call.value[:, :, block.far], call.value[:, :, block.near]), dim=2)
        output, probs = attend(queries[:, :, block.queries], keys, values, mask_of(block))
        outputs.append(output)
        if probs is not None:
            num_far = block.far.stop - block.far.start
            of_keys = probs.new_zeros(*probs.shape[:-1], call.key.shape[2])
            of_keys[..., block.far] += probs[..., :num_far]
            of_keys[..., block.near] += probs[..., num_far:]
            all_probs.append(of_keys)
    probs = _in_rows(call, expert, torch.cat(all_probs, dim=2).transpose(1, 2)) if all_probs else None
    return _in_rows(call, expert, torch.cat(outputs, dim=1)), None if probs is None else probs.transpose(1, 2)


def _in_rows(call: AttentionCall, expert: int, output: torch.Tensor) -> torch.Tensor:
    """Outputs of the rows that may pick an expert `[B, S', ...]`, with zeros for the others `[B, S, ...]`."""
    rows, length = call.rows_of(expert), call.query.shape[2]
    return pad(output, (0, 0, 0, 0, rows.start, length - rows.stop)) if output.shape[1] < length else output


def _operator_of_parts(call: AttentionCall, expert: int) -> Operator | None:
    """What computes attention with its log-sum-exps; None where that is not at hand, or is not what `call` wants."""
    is_in_order = call.query_positions is None and isinstance(call.query_start, int)
    # Eager attention gives probabilities, and functions without a name might.
    if call.backend in (None, "eager") or not is_in_order or call.needs_gradients() or _start(call, expert) < 1:
        return None
    if (call.attention_mask is None and not call.is_causal) or call.why_not_plain() or why_not_now():
        return None
    return operator_of(call)


def _attend_in_parts(
    call: AttentionCall, expert: int, query: torch.Tensor, key: torch.Tensor, operator: Operator
) -> torch.Tensor:
    """[`attend_by_distance`] for the rows that may pick the expert, without gradients: `[B, S', H, D]`.

    Queries at a to b - 1, no more than `near`, have far keys before a - near, near ones from b - near on, and as many
    as there are queries between: those up to the query's own number among them are far, those after it near.
    """
    near, start, rows, mask = _start(call, expert), call.query_start, call.rows_of(expert), call.attention_mask
    assert isinstance(start, int)
    turn, num_keys, num_far = call.rotations.num_experts + expert, call.key.shape[2], start + rows.stop - near
    far_key = turned_keys(call, turn, num_far) if num_far > 0 else key
    most = near if mask is None else min(near, _BLOCK)
    first, outputs = rows.start, []
    while first < rows.stop:
        # The first queries may have near keys alone.
        end = min(first + most, rows.stop, *((near - start,) if start + first < near else ()))
        queries = slice(first, end)
        asks, parts = query[:, :, queries], []
        far_asks = asks
        if start + first >= near:
            assert call.rotations.far is not None
            far_asks = turned_query(call, turn, call.rotations.far.factors[turn], near, queries)
        for is_far, keys, sees in _parts(start + first, start + end, near, None if mask is None else num_keys):
            shown = None if mask is None else mask.expand(-1, -1, call.query.shape[2], num_keys)[:, :, queries, keys]
            rotated = far_key if is_far else key
            part = far_asks if is_far else asks, rotated[:, :, keys], call.value[:, :, keys], sees, shown
            parts.append(Part(*part))
        outputs.append(attend(parts, operator, call.scaling))
        first = end
    return torch.cat(outputs, dim=1)


def _parts(first: int, end: int, near: int, masked: int | None) -> list[tuple[bool, slice, str]]:
    """The keys of queries at `first` to `end` - 1, at most `near`: whether they are far, which, and who sees them.

    With a mask there are `masked` keys, and it says what is seen; else attention is causal.
    """
    border, found = max(end - near, 0), []
    if first >= near and end - first == 1:
        found = [(True, slice(0, border), "all")]
    elif first >= near:
        found = [(True, slice(0, first - near), "all"), (True, slice(first - near, border), "up to")]
        found += [(False, slice(first - near, border), "after")]
    if masked is not None or end - first == 1:
        found += [(False, slice(border, masked or end), "all")]
    else:
        found += [(False, slice(border, first), "all"), (False, slice(first, end), "up to")]
    return [part for part in found if part[1].start < part[1].stop]


def _towards_query(call: AttentionCall, expert: int, key: torch.Tensor) -> torch.Tensor:
    """Keys such that the only query, under its rotation for near ones, has the right scores with all of them.

    A far key at n is turned by `(φ - θ) (n - m + start)`, for the query at m as well as for itself.
    """
    far, rotations, start = call.rotations.far, call.rotations, _start(call, expert)
    if far is None or start == NEVER:
        return key
    turn = rotations.num_experts + expert
    factor = far.factors[turn] / far.factors[expert]
    position = call.query_start
    if call.query_positions is None and isinstance(position, int):
        num_far = max(position - start + 1, 0)
        cos, sin = (x[turn, :num_far].flip(0) for x in rotations.cos_sin(call.key.shape[2], key.device))
        far_key = rotate(call.key[:, :, :num_far], cos * factor, -sin * factor, rotations.layout)
        return torch.cat((far_key, key[:, :, num_far:]), dim=2)
    beyond = _distances(call, slice(None), slice(None))[:, :, 0] - start  # [B or 1, 1, T]
    if call.query_positions is None:
        tables = rotations.cos_sin(call.key.shape[2], key.device)
        cos, sin = (x[turn, beyond.clamp(min=0)] for x in tables)
    else:
        cos, sin = rotations.cos_sin_at(beyond, turn)
    far_key = rotate(call.key, cos * factor, -sin * factor, rotations.layout)
    return torch.where(beyond[..., None] >= 0, far_key, key)


def _start(call: AttentionCall, expert: int) -> int:
    """The distance from which keys are far."""
    return NEVER if call.rotations.far is None else call.rotations.far.starts[expert]


def far_pair(call: AttentionCall, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `[B, H, S, D]` and keys `[B, G, T, D]` as an expert rotates them for far keys, with its factor."""
    far, rotations = call.rotations.far, call.rotations
    assert far is not None
    turn = rotations.num_experts + expert
    query = turned_query(call, turn, far.factors[turn], far.starts[expert])
    return query, turned_keys(call, turn, call.key.shape[2])


def is_far(call: AttentionCall, expert: int, queries: slice = slice(None), keys: slice = slice(None)) -> torch.Tensor:
    """Whether keys are far from queries, `[B or 1, 1, S, T]` of booleans; of some of them."""
    return _distances(call, queries, keys) >= _start(call, expert)


def _distances(call: AttentionCall, queries: slice, keys: slice) -> torch.Tensor:
    device = call.query.device
    if call.query_positions is not None and call.key_positions is not None:
        of_queries, of_keys = call.query_positions[:, None, queries], call.key_positions[:, None, keys]
        return of_queries[..., None].to(device) - of_keys[:, :, None].to(device)
    of_queries = call.query_start + torch.arange(call.query.shape[2], device=device)
    of_keys = torch.arange(call.key.shape[2], device=device)
    return (of_queries[queries, None] - of_keys[None, keys])[None, None]


def _blocks(call: AttentionCall, expert: int) -> Iterator[_Block]:
    """The queries in pieces, with the keys that may be near or far to some of each."""
    rows, num_keys, start, border = call.rows_of(expert), call.key.shape[2], call.query_start, _start(call, expert)
    for first in range(rows.start, rows.stop, _BLOCK):
        last = min(first + _BLOCK, rows.stop) - 1
        near, far = slice(0, num_keys), slice(0, num_keys if border < NEVER else 0)
        if call.query_positions is None and isinstance(start, int):
            end = start + last + 1 if call.is_causal else num_keys
            far = slice(0, min(max(start + last - border + 1, 0), end))
            near = slice(min(max(start + first - border + 1, 0), end), end)
        yield _Block(slice(first, last + 1), near, far)


def _mask_of(call: AttentionCall, expert: int) -> Callable[[_Block], torch.Tensor]:
    """Makes masks `[B or 1, 1 or H, S, far and near keys]` of blocks: what may be seen, and under which rotation."""
    mask = call.attention_mask
    adds = isinstance(mask, torch.Tensor) and mask.dtype != torch.bool

    def seen(block: _Block, keys: slice) -> torch.Tensor | None:
        if mask is None:
            return _distances(call, block.queries, keys) >= 0 if call.is_causal else None
        if not isinstance(mask, torch.Tensor):
            return _dense(mask, call, block.queries, keys)
        rows = mask if mask.shape[2] == 1 else mask[:, :, block.queries]
        return rows[..., keys]

    def part(block: _Block, keys: slice, wants_far: bool) -> torch.Tensor:
        allowed, shown = is_far(call, expert, block.queries, keys) == wants_far, seen(block, keys)
        if shown is None:
            return allowed
        return shown.masked_fill(~allowed, -torch.inf) if adds else allowed & shown

    def made(block: _Block) -> torch.Tensor:
        far, near = part(block, block.far, True), part(block, block.near, False)
        leading = torch.broadcast_shapes(far.shape[:-1], near.shape[:-1])
        return torch.cat([x.expand(*leading, -1) for x in (far, near)], dim=-1)

    return made


def _dense(mask: Any, call: AttentionCall, queries: slice, keys: slice) -> torch.Tensor:
    """Some rows and columns of a `BlockMask` of flex attention, as booleans."""
    from torch.nn.attention.flex_attention import create_mask

    first, length = queries.start, queries.stop - queries.start

    def shifted(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = mask.mask_mod(b, h, q + first, kv)
        return seen

    batch, device = call.query.shape[0], str(call.query.device)
    return create_mask(shifted, batch, 1, length, call.key.shape[2], device=device)[..., keys]


def _attend_of(call: AttentionCall) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The model's own attention, or PyTorch's where that takes no mask of four dimensions."""
    scaling, group = call.scaling, call.query.shape[1] // call.key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        if call.backend is None or call.backend in _READ_MASKS:
            assert call.attend is not None
            # The default is that of heads of the size that these have.
            return call.attend(q, k, v, mask, **{**call.options, "scaling": scaling})
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return output.transpose(1, 2), None

    return attend
