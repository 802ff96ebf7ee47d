"""The model's own attention, called once per expert: any backend, no kernels of our own."""

import torch

from .call import AttentionCall
from .rotating import rotated_pairs


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    return "it needs the model's own attention, `attend`" if call.attend is None else None


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See [`mixed_attention`]. Costs N attentions, whatever `top_k` is."""
    gates = call.gates.to(call.query.dtype)
    mixed_output, mixed_probs = None, None
    for expert, (query, key) in enumerate(rotated_pairs(call)):
        output, probs = call.run_attend(query, key)
        gate = gates[..., expert, None]  # [B, H, S, 1]
        output = output * gate.transpose(1, 2)
        mixed_output = output if mixed_output is None else mixed_output + output
        if probs is not None:
            probs = probs * gate
            mixed_probs = probs if mixed_probs is None else mixed_probs + probs
    assert mixed_output is not None
    return mixed_output, mixed_probs
