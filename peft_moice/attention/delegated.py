"""The model's own attention, called once per expert: any backend, no kernels of our own."""

import torch

from ..rope.rotation import NEVER
from . import by_distance
from .call import AttentionCall
from .rotating import rotated_pairs


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    if call.attend is None:
        return "it needs the model's own attention, `attend`"
    return None if call.rotations.far is None else by_distance.why_not(call)


def _in_blocks(call: AttentionCall, expert: int) -> bool:
    """Whether an expert has far keys, or few enough of the queries to leave the others out."""
    if call.rotations.far is not None and call.rotations.far.starts[expert] < NEVER:
        return True
    rows = call.rows_of(expert)
    return rows.stop - rows.start < call.query.shape[2] and by_distance.why_not(call) is None


def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See [`mixed_attention`]. Costs N attentions, whatever `top_k` is."""
    gates = call.gates.to(call.query.dtype)
    mixed_output, mixed_probs = None, None
    for expert, (query, key) in enumerate(rotated_pairs(call)):
        rows = call.rows_of(expert)
        if rows.start == rows.stop:
            continue
        if _in_blocks(call, expert):
            output, probs = by_distance.attend_by_distance(call, expert, query, key)
        else:
            output, probs = call.run_attend(query, key)
        gate = gates[..., expert, None]  # [B, H, S, 1]
        output = output * gate.transpose(1, 2)
        mixed_output = output if mixed_output is None else mixed_output + output
        if probs is not None:
            probs = probs * gate
            mixed_probs = probs if mixed_probs is None else mixed_probs + probs
    assert mixed_output is not None
    return mixed_output, mixed_probs
