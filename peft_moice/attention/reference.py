"""The definition of the operator, in plain float32 operations. Every other implementation is tested against it."""

from dataclasses import replace

import torch

from ..rope.rotation import NEVER
from .by_distance import far_pair, is_far
from .call import AttentionCall
from .rotating import rotated_pairs


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    mask = call.attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 4):
        return (
            f"it reads a mask of shape [B, 1, S, T], not {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}; "
            "load the model with attn_implementation='eager' or 'sdpa'"
        )
    return None


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`mixed_attention`]. Reads a four-dimensional mask, boolean (true: attend) or additive, or None (causal)."""
    if call.turned is not None:
        call = replace(call, turned=None)  # owes nothing to other passes
    options, dtype, heads = call.options, call.query.dtype, call.query.shape[1]
    full = torch.promote_types(dtype, torch.float32)
    groups, bias = heads // call.key.shape[1], bias_of(call)
    softcap, s_aux = options.get("softcap"), options.get("s_aux")
    value = call.value.to(full).repeat_interleave(groups, dim=1)
    mixed_probs = torch.zeros((), dtype=full, device=call.query.device)
    far = call.rotations.far
    for expert, (query, key) in enumerate(rotated_pairs(call)):
        scores = query.to(full) @ key.to(full).repeat_interleave(groups, dim=1).mT * call.scaling
        if far is not None and far.starts[expert] < NEVER:
            query, key = far_pair(call, expert)
            far_scores = query.to(full) @ key.to(full).repeat_interleave(groups, dim=1).mT * call.scaling
            scores = torch.where(is_far(call, expert), far_scores, scores)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + bias
        if s_aux is not None:
            sinks = s_aux.to(full).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probs = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            # As in PyTorch's attention, a query that sees nothing gets zeros.
            sees_nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
            probs = scores.masked_fill(sees_nothing, 0.0).softmax(dim=-1).masked_fill(sees_nothing, 0.0)
        mixed_probs = mixed_probs + call.gates[..., expert, None].to(full) * probs
    dropped = torch.nn.functional.dropout(mixed_probs, p=options.get("dropout") or 0.0)
    return (dropped @ value).transpose(1, 2).contiguous().to(dtype), mixed_probs.to(dtype)


def bias_of(call: AttentionCall) -> torch.Tensor:
    """What is added to scores, broadcasting to `[B, H, S, T]`."""
    device, (num_queries, num_keys) = call.query.device, (call.query.shape[-2], call.key.shape[-2])
    mask: torch.Tensor | None = call.attention_mask
    if mask is None:
        if not call.is_causal:
            return torch.zeros(1, 1, 1, 1, device=device)
        index = call.query_start + torch.arange(num_queries, device=device)
        mask = torch.arange(num_keys, device=device) <= index[:, None]
    if mask.dtype != torch.bool:
        return mask.to(torch.float32)
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)
