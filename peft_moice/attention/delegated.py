"""The model's own attention, called once per expert: any backend, no kernels of our own."""

from collections.abc import Callable

import torch

from ..rope import RotationTable
from .rotating import rotated_pairs


def delegated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    attend: Callable,
    attention_mask=None,
    picked: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See [`mixed_attention`]. Costs N attentions, whatever `top_k` is."""
    gates = gates.to(query.dtype)
    mixed_output, mixed_probs = None, None
    for expert, (q, k) in enumerate(rotated_pairs(query, key, rotations, query_start)):
        output, probs = attend(q, k, value, attention_mask, **kwargs)
        gate = gates[..., expert, None]  # [B, H, S, 1]
        output = output * gate.transpose(1, 2)
        mixed_output = output if mixed_output is None else mixed_output + output
        if probs is not None:
            probs = probs * gate
            mixed_probs = probs if mixed_probs is None else mixed_probs + probs
    return mixed_output, mixed_probs
