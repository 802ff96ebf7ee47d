"""The implementation by the name of "triton": whether it can run, and the call. Imports Triton when called."""

import importlib.util
import os
from collections.abc import Callable

import torch

from ...rope import RotationTable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_SIZE = 256


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    picked: torch.Tensor | None = None,
    attend: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Kernels for CUDA, causal or under a four-dimensional mask.

    Products take the dtype of the tensors (full float32, not TF32) and are summed in float32. Under autocast, tensors
    are cast as for PyTorch's own attention.

    Raises:
        ValueError: the kernels cannot compute this call, or the queries do not fit the keys.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    reason = why_not_triton(query, key, value, attention_mask, query_start, **kwargs)
    if reason is not None:
        raise ValueError(f"The triton implementation cannot be used: {reason}. Choose implementation='delegated'.")
    if isinstance(query_start, int) and query_start + query.shape[-2] > key.shape[-2]:
        raise ValueError(
            f"{query.shape[-2]} queries starting at position {query_start} do not fit {key.shape[-2]} keys: the cache "
            "keeps keys in a layout whose positions cannot be told. Use one of transformers' own caches."
        )
    from .autograd import run

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = run(query, key, value, gates, picked, attention_mask, rotations, query_start, scaling)
    return output.to(dtype), None


def why_not_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_start: int | torch.Tensor,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> str | None:
    """The reason why [`triton_attention`] cannot compute this call, or None."""
    if query.device.type != "cuda" and not (query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"it is for CUDA, and the queries are on {query.device.type!r} (on the CPU, set the environment variable "
            "TRITON_INTERPRET=1 before Triton is imported, which is for tests only)"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if query.device.type == "cpu" and not _interprets():
        return "TRITON_INTERPRET=1 was set after Triton was imported, so its kernels are not interpreted"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return (
            "it reads queries, keys and values of one dtype, float32, float16 or bfloat16, not "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_SIZE:
        return f"it reads heads of up to {_MAX_HEAD_SIZE} dimensions, not {query.shape[-1]} (values {value.shape[-1]})"
    if isinstance(query_start, torch.Tensor) and query_start.dim() > 0:
        return "it reads one position for the first query, and packed sequences have one for each"
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        return "it knows no dropout, softcap, attention sinks or position bias"
    if output_attentions:
        return "it does not give attention probabilities"
    if attention_mask is None:
        if is_causal is False:
            return "it is causal"
        if sliding_window is not None and key.shape[-2] > sliding_window:
            return "it reads a sliding window from the mask, and there is none; load the model with 'sdpa' or 'eager'"
        return None
    return _why_not_mask(query, key, attention_mask)


def _why_not_mask(query: torch.Tensor, key: torch.Tensor, mask: object) -> str | None:
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return "it reads masks of four dimensions only"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"it reads boolean and additive masks, not {mask.dtype}"
    shape = (*query.shape[:3], key.shape[2])
    if any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        return f"the mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}"
    if mask.requires_grad:
        return "it has no gradient for the mask"
    return None


def _interprets() -> bool:
    from .tiles import INTERPRETED

    return bool(INTERPRETED)
