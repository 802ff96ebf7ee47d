"""The operator by kernels in C: cost follows K, and decoding reads keys and values once."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...rope import RotationTable
from ..call import AttentionCall
from ..cpu_limits import first_position, why_not_on_cpu
from . import graphs
from .kernel import TYPES, differentiate, forward
from .library import load

_MAX_HEAD_DIM = 256


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    # Not while `torch.export` traces: who runs its programs may have nothing but PyTorch.
    in_graph = torch.compiler.is_dynamo_compiling()
    reason = why_not_on_cpu(call, in_graph)
    if reason is not None:
        return reason
    if max(call.query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"it knows head sizes up to {_MAX_HEAD_DIM}"
    if in_graph and type(call.rotations) is not RotationTable:
        return "a graph of torch.compile cannot hand it rotations that change with the sequence"
    for name, tensor in {"queries": call.query, "keys": call.key, "values": call.value, "gates": call.gates}.items():
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
    if torch.compiler.is_compiling():
        return graphs.run(call, *tensors).to(call.query.dtype), None
    options = (call.rotations, first_position(call), call.scaling, call.is_causal)
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
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, gates, picked, mask = ctx.saved_tensors
        options, wanted = ctx.options, ctx.needs_input_grad[:4]
        grads = differentiate(grad_output, query, key, value, gates, picked, mask, options, wanted)
        return *grads, *(None,) * 6
