"""The kernels as a differentiable function."""

import torch
from torch.autograd.function import once_differentiable

from ...rope import RotationTable
from .backward import gradients
from .decoding import decode, fits
from .picks import list_picks
from .prefill import prefill
from .problem import Problem


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    picked: torch.Tensor | None,
    mask: torch.Tensor | None,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The operator's output `[B, S, H, Dv]` in the dtype of `query`, whose dtype key and value share."""
    gates = gates.float().contiguous()
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        return _run(query, key, value, gates, picked, mask, rotations, query_start, scaling)


def _run(query, key, value, gates, picked, mask, rotations, query_start, scaling) -> torch.Tensor:
    with_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, gates))
    if not with_gradients:
        if picked is not None:
            gates = gates * picked
        problem = Problem(query, key, value, gates, mask, rotations, query_start, scaling)
        if fits(problem):
            return decode(problem)
        return prefill(problem, list_picks(gates != 0, key.shape[1]), keep=False)[0].to(query.dtype)
    picked = gates != 0 if picked is None else picked
    return _MixedAttention.apply(query, key, value, gates, picked, mask, rotations, query_start, scaling)


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
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, gates, picked, mask, output, row_max, row_sum = ctx.saved_tensors
        problem = Problem(query, key, value, gates, mask, *ctx.options)
        picks = list_picks(picked, key.shape[1])
        with torch.cuda.device_of(query):
            grads = gradients(problem, picks, output, row_max, row_sum, grad_output, ctx.needs_input_grad[:4])
        dtypes = (query.dtype, key.dtype, value.dtype, gates.dtype)
        grads = [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
        return (*grads, None, None, None, None, None)
