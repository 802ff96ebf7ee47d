"""The kernels as a differentiable function."""

import torch

from ..call import AttentionCall
from ..first_order import FirstOrder
from .backward import gradients
from .decoding import decode, fits
from .picks import list_picks
from .prefill import prefill
from .problem import Problem


def attend(call: AttentionCall) -> torch.Tensor:
    """The operator's output `[B, S, H, Dv]` in the dtype of the query, whose dtype key and value share."""
    # Triton launches on the current device.
    with torch.cuda.device_of(call.query):
        output = _attend(call, call.gates.float().contiguous())
    mask = call.attention_mask
    if mask is None or mask.dtype != torch.bool:
        return output
    # The kernels spread rows that see nothing over all keys, as additive masks have it; boolean ones leave zeros.
    seen: torch.Tensor = mask.any(dim=-1).transpose(1, 2)[..., None]  # [B, S, 1 or H, 1]
    return output * seen


def _attend(call: AttentionCall, gates: torch.Tensor) -> torch.Tensor:
    query, key, value, mask = call.query, call.key, call.value, call.attention_mask
    options = (call.rotations, call.query_start, call.scaling)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, gates)):
        output: torch.Tensor = _MixedAttention.apply(query, key, value, gates, call.picks(), mask, *options)
        return output
    if call.picked is not None:
        gates = gates * call.picked
    problem = Problem(query, key, value, gates, mask, *options)
    if fits(problem):
        return decode(problem)
    return prefill(problem, list_picks(gates != 0, call.key.shape[1]), keep=False)[0].to(call.query.dtype)


class _MixedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, the output, and two numbers per pick; nothing rotated, nothing of S x T."""

    @staticmethod
    def forward(ctx, query, key, value, gates, picked, mask, rotations, query_start, scaling):
        problem = Problem(query, key, value, gates, mask, rotations, query_start, scaling)
        output, row_max, row_sum = prefill(problem, list_picks(picked, key.shape[1]), keep=True)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, gates, picked, mask, output, row_max, row_sum)
        ctx.options = (rotations, query_start, scaling)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, picked, mask, output, row_max, row_sum = ctx.saved_tensors

        def differentiate(grad_output, query, key, value, gates):
            problem = Problem(query, key, value, gates, mask, *ctx.options)
            picks = list_picks(picked, key.shape[1])
            with torch.cuda.device_of(query):
                grads = gradients(problem, picks, output, row_max, row_sum, grad_output, ctx.needs_input_grad[:4])
            dtypes = (query.dtype, key.dtype, value.dtype, gates.dtype)
            return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]

        return (*FirstOrder.apply(differentiate, grad_output, *tensors), None, None, None, None, None)
