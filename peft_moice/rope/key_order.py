"""Whether the order of the keys gives the differences of positions that attention reads."""

from dataclasses import dataclass
from typing import Any

import torch

_ENTRIES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Order:
    """
    Attributes:
        holds: every query stands as far from every key that it sees as their indices do.
        continues: besides, every row is one sequence that counts up to its last token, so that a next token which goes
            on counting will find the same. Not so where a row ends in padding.
    """

    holds: bool
    continues: bool


def judge_order(ids: torch.Tensor, keys: torch.Tensor, start: int, batch: int, attention_mask: Any) -> Order:
    """Compare positions with indices. Waits for the device.

    Args:
        ids: `[B or 1, S]`, positions of the queries.
        keys: `[B or 1, T]`, positions of the keys.
        start: index of the first query among the keys.
        batch: B.
        attention_mask: what the attention function received: `[B or 1, 1 or H, S, T]`, boolean or additive, `[B, T]`,
            or None. Under masks of other kinds no pair is taken as hidden.
    """
    num_queries = ids.shape[-1]
    num_keys, device = keys.shape[-1], ids.device
    # Constant within a stretch of tokens that count up.
    of_queries = ids - start - torch.arange(num_queries, device=device)
    of_keys = keys.to(device) - torch.arange(num_keys, device=device)
    last = of_queries[:, -1:]
    if bool(((of_queries == last).all(dim=-1) & (of_keys == last).all(dim=-1)).all()):
        return Order(True, _ends_in_tokens(attention_mask, start + num_queries - 1))
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape[-1] != num_keys:
        return Order(False, False)
    of_queries, of_keys = (offsets.expand(batch, -1) for offsets in (of_queries, of_keys))
    if attention_mask.dim() == 2:
        return _under_padding(of_keys, start + num_queries - 1, attention_mask.to(device).bool())
    if attention_mask.dim() == 4 and attention_mask.shape[-2] in (1, num_queries):
        return _under_mask(of_queries, of_keys, start, attention_mask)
    return Order(False, False)


def _under_padding(of_keys: torch.Tensor, last: int, real: torch.Tensor) -> Order:
    """Padding, where `real` `[B, T]` is false, is left out; tokens see all others up to themselves."""
    first_real = real.int().argmax(dim=-1, keepdim=True)
    holds = not bool((real & (of_keys != of_keys.gather(-1, first_real))).any())
    return Order(holds, holds and _ends_in_tokens(real, last))


def _under_mask(of_queries: torch.Tensor, of_keys: torch.Tensor, start: int, mask: torch.Tensor) -> Order:
    batch, num_queries = of_queries.shape
    num_keys, device = of_keys.shape[-1], mask.device
    of_queries, of_keys = of_queries.to(device), of_keys.to(device)
    seen = torch.zeros(batch, num_keys, dtype=torch.bool, device=device)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    rows = max(1, _ENTRIES_AT_ONCE // max(1, batch * num_keys))
    for first in range(0, num_queries, rows):
        piece = of_queries[:, first : first + rows, None]
        visible = visible_keys(mask if mask.shape[-2] == 1 else mask[:, :, first : first + rows])
        wrong |= (visible & (piece != of_keys[:, None])).any()
        seen |= visible.any(dim=-2)
    if bool(wrong):
        return Order(False, False)
    ends_in_tokens = _ends_in_tokens(mask, start + num_queries - 1)
    return Order(True, ends_in_tokens and not bool((seen & (of_keys != of_queries[:, -1:])).any()))


def _ends_in_tokens(mask: Any, last: int) -> bool:
    """Whether no row ends in padding, which a mask hides from itself; `last` is the index of the last query."""
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] <= last:
        return True
    own = mask[..., last].bool() if mask.dim() == 2 else visible_keys(mask[:, :, -1:, last : last + 1])
    return bool(own.all())


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """Which keys some head sees, `[B or 1, S, T]`, of a boolean or additive mask `[B or 1, 1 or H, S, T]`."""
    if mask.dtype == torch.bool:
        return mask.any(dim=1)
    return (mask > torch.finfo(mask.dtype).min / 2).any(dim=1)
