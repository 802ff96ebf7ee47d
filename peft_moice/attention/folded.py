"""The model's own attention, called once for all experts: they are further heads of one call."""

import torch

from .call import AttentionCall
from .rotating import rotated_pairs

_PER_HEAD = ("s_aux", "position_bias")
"""Options of attention functions whose first or second dimension counts query heads."""


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    if call.attend is None:
        return "it needs the model's own attention, `attend`"
    if call.attention_mask is not None and not isinstance(call.attention_mask, torch.Tensor):
        return f"it reads masks that are tensors, not a {type(call.attention_mask).__name__}"
    if call.rotations.far is not None:
        return 'it knows no ropes by distance, and no attention scaling (which `"attention_factor": 1.0` leaves out)'
    if any(call.options.get(name) is not None for name in _PER_HEAD):
        return "it knows no attention sinks or position bias, which belong to heads"
    return None


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See [`mixed_attention`]. One call of N · H heads; memory of N rotated copies of queries and keys, and of values.

    Costs N attentions, whatever `top_k` is, in one launch: for backends that leave a device idle with H heads, as in
    decoding. Query head `j · H + h` meets key-value head `j · G + h // (H / G)`, as grouped queries do.
    """
    num_experts = call.num_experts
    queries, keys = zip(*rotated_pairs(call), strict=True)
    value = call.value.repeat(1, num_experts, 1, 1)
    mask = call.attention_mask
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.repeat(1, num_experts, 1, 1)
    assert call.attend is not None
    output, probs = call.attend(torch.cat(queries, dim=1), torch.cat(keys, dim=1), value, mask, **call.options)
    gates = call.gates.to(call.query.dtype).permute(0, 2, 3, 1)  # [B, S, N, H]
    output = output.reshape(*gates.shape, -1)  # [B, S, N, H, Dv]
    mixed = torch.einsum("bsnh,bsnhd->bshd", gates, output)
    if probs is None:
        return mixed, None
    probs = probs.reshape(probs.shape[0], num_experts, -1, *probs.shape[2:])  # [B, N, H, S, T]
    return mixed, torch.einsum("bsnh,bnhst->bhst", gates, probs)
