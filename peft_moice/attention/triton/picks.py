"""Which rows picked which expert, listed on the device."""

from dataclasses import dataclass

import torch


@dataclass
class Picks:
    """The rows of each expert in a key-value head's R query heads: Z = B · G lists per expert.

    A row is `token * R + head`, so that rows which lie side by side see nearly the same keys, and share them.

    Attributes:
        rows: `[Z, N, S * R + 1]` int32, an expert's rows in ascending order, then undefined.
        counts: `[Z, N]` int32, how many they are.
        through: `[Z, N, S * R]` int32, how many of them come up to and including each row.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    through: torch.Tensor


def list_picks(picked: torch.Tensor, num_kv_heads: int) -> Picks:
    """List the picks `[B, H, S, N]` without asking the device for a number."""
    batch, heads, length, num_experts = picked.shape
    groups = heads // num_kv_heads
    picked = picked.view(batch, num_kv_heads, groups, length, num_experts).permute(0, 1, 4, 3, 2)
    picked = picked.reshape(batch * num_kv_heads, num_experts, length * groups)
    through = picked.cumsum(-1)
    num_rows = picked.shape[-1]
    place = torch.where(picked, through - 1, num_rows)
    row = torch.arange(num_rows, dtype=torch.int32, device=picked.device).expand_as(place)
    rows = torch.zeros(*place.shape[:2], num_rows + 1, dtype=torch.int32, device=picked.device)
    rows.scatter_(-1, place, row)
    through = through.int()
    return Picks(rows, through[..., -1].contiguous(), through)
