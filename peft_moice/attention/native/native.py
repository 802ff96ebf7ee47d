"""The operator by kernels in C: cost follows K, and decoding reads keys and values once."""

import functools
from typing import Any

import torch

from ...rope import RotationTable
from ..call import AttentionCall, why_not_now
from ..first_order import FirstOrder
from . import graphs
from .kernel import TYPES, differentiate, first_position, forward
from .library import load

_MAX_HEAD_DIM = 256
_NAMES = ("queries", "keys", "values", "gates")


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    # Not while `torch.export` traces: who runs its programs may have nothing but PyTorch.
    in_graph = torch.compiler.is_dynamo_compiling()
    if call.query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {call.query.device.type!r}"
    if 0 in (*call.query.shape, *call.value.shape):
        return "there is nothing to attend to"
    reason = call.why_not_plain() or (None if in_graph else why_not_now())
    if reason is not None:
        return reason
    if max(call.query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"it knows head sizes up to {_MAX_HEAD_DIM}"
    if in_graph and type(call.rotations) is not RotationTable:
        return "a graph of torch.compile cannot hand it rotations that change with the sequence"
    for name, tensor in zip(_NAMES, (call.query, call.key, call.value, call.gates), strict=True):
        if type(tensor) is not torch.Tensor and not in_graph:
            return f"it reads the memory of plain tensors, and the {name} are a {type(tensor).__name__}"
        if tensor.dtype not in TYPES:
            return f"it computes in float32, and the {name} are in {tensor.dtype}"
    if call.rotations.far is not None and (in_graph or call.needs_gradients()):
        return "it has no gradients, and no operator for torch.compile, of ropes by distance"
    return _why_not_loaded()


def _why_not_loaded() -> str | None:
    library = load()
    return library if isinstance(library, str) else None


# Graphs take the answer as it is now, since nothing in them can call a compiler.
_why_not_loaded = torch.compiler.assume_constant_result(_why_not_loaded)


def run(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Computes in float32, whatever the dtype of queries, keys and values is.

    For the backward pass the inputs are kept and nothing else. Besides them and the results, many queries need memory
    that does not grow with the length, the backward pass a few copies of the gradients of keys and values, and few
    queries `H · K · T` floats.
    """
    query, key, value = call.query, call.key, call.value
    if not query.dtype == key.dtype == value.dtype:
        query, key, value = query.float(), key.float(), value.float()
    tensors = (query, key, value, call.gates.float())
    if torch.compiler.is_dynamo_compiling():
        return graphs.run(call, *tensors).to(call.query.dtype), None
    start = call.query_start
    if not isinstance(start, int):
        start = first_position(start, query, key)
    options = (call.rotations, start, call.scaling, call.is_causal)
    output: torch.Tensor
    if call.needs_gradients():
        inputs = (*tensors, call.picks(), call.attention_mask, *options)
        output = _NativeAttention.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        output = forward(*tensors, call.attention_mask, *options)
    return output.to(call.query.dtype), None


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        query, key, value, gates, picked, mask, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, gates, picked, mask)
        return forward(query, key, value, gates, mask, *ctx.options)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, picked, mask = ctx.saved_tensors
        known = {"picked": picked, "mask": mask, "options": ctx.options, "wanted": ctx.needs_input_grad[:4]}
        gradients = functools.partial(differentiate, **known)
        grads = FirstOrder.apply(gradients, grad_output, *tensors)  # type: ignore[no-untyped-call]
        return *grads, *(None,) * 6
