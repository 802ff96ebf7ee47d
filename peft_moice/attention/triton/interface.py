"""The implementation by the name of "triton": whether it can run, and the call. Imports Triton when called."""

import dataclasses
import importlib.util
import os

import torch

from ..call import AttentionCall

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_SIZE = 256


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    query, key, value = (x.dtype for x in _in_autocast(call))
    device = call.query.device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"it is for CUDA, and the queries are on {device!r} (on the CPU, set the environment variable "
            "TRITON_INTERPRET=1 before Triton is imported, which is for tests only)"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if query not in _DTYPES or key != query or value != query:
        return (
            "it reads queries, keys and values of one dtype, float32, float16 or bfloat16, not "
            f"{query}, {key} and {value}"
        )
    sizes = (call.query.shape[-1], call.value.shape[-1])
    if max(sizes) > _MAX_HEAD_SIZE:
        return f"it reads heads of up to {_MAX_HEAD_SIZE} dimensions, not {sizes[0]} (values {sizes[1]})"
    if call.attention_mask is None and not call.is_causal:
        return "it is causal"
    if call.rotations.far is not None:
        return 'it knows no ropes by distance, and no attention scaling (which `"attention_factor": 1.0` leaves out)'
    return call.why_not_plain()


def run(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Kernels for CUDA, causal or under a four-dimensional mask.

    Products take the dtype of the tensors (full float32, not TF32) and are summed in float32. Under autocast, tensors
    are cast as for PyTorch's own attention.
    """
    from .autograd import attend

    query, key, value = _in_autocast(call)
    output = attend(dataclasses.replace(call, query=query, key=key, value=value))
    return output.to(call.query.dtype), None


def _in_autocast(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, in the dtype of autocast where that is on."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device):
        return call.query, call.key, call.value
    low = torch.get_autocast_dtype(device)
    return call.query.to(low), call.key.to(low), call.value.to(low)
