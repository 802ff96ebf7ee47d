"""The definition of the operator, in plain float32 operations. Every other implementation is tested against it."""

from collections.abc import Callable

import torch

from ..rope import RotationTable
from .masks import additive
from .rotating import rotated_pairs


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    attend: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`mixed_attention`]. Reads a four-dimensional mask, boolean (true: attend) or additive, or None (causal)."""
    dtype, num_queries, num_keys = query.dtype, query.shape[-2], key.shape[-2]
    query, key, value, gates = query.float(), key.float(), value.float(), gates.float()
    groups = query.shape[1] // key.shape[1]
    value = value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = _additive_mask(attention_mask, query_start, num_queries, num_keys, is_causal, query.device)

    mixed_probs = 0.0
    for expert, (q, k) in enumerate(rotated_pairs(query, key, rotations, query_start)):
        scores = q @ k.repeat_interleave(groups, dim=1).mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + bias
        if s_aux is not None:
            sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probs = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            probs = scores.softmax(dim=-1)
        mixed_probs = mixed_probs + gates[..., expert, None] * probs
    dropped = torch.nn.functional.dropout(mixed_probs, p=dropout)
    return (dropped @ value).transpose(1, 2).contiguous().to(dtype), mixed_probs.to(dtype)


def _additive_mask(
    mask: torch.Tensor | None,
    query_start: int | torch.Tensor,
    num_queries: int,
    num_keys: int,
    is_causal: bool | None,
    device: torch.device,
) -> torch.Tensor:
    if mask is None:
        if is_causal is False:
            return torch.zeros(1, 1, 1, 1, device=device)
        positions = query_start + torch.arange(num_queries, device=device)
        mask = torch.arange(num_keys, device=device) <= positions[:, None]
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise ValueError(
            f"The reference implementation reads a mask of shape [B, 1, S, T], not {type(mask).__name__} "
            f"{tuple(getattr(mask, 'shape', ()))}. Use implementation='delegated', or load the model with "
            "attn_implementation='eager' or 'sdpa'."
        )
    return additive(mask, torch.float32)
