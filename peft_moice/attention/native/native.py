"""The operator by the kernels of `kernels.c`: cost follows K, keys are never copied in decoding."""

import ctypes
import functools

import torch

from ...rope import RotaryLayout, RotationTable
from ..cpu_limits import why_not_on_cpu
from .library import Problem, load

_MAX_HEAD_DIM = 256
_MOST_DECODED = 8
_SCORES_IN_CACHE = 1 << 15
_TILE_STEP, _MAX_TILE = 6, 48


def native(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    picked: torch.Tensor | None = None,
    attend=None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Causal, or under a four-dimensional mask; works in float32; has no backward pass."""
    reason = why_not_native(query, key, value, gates, attention_mask, **kwargs)
    if reason is not None:
        raise ValueError(f"The native implementation cannot be used: {reason}. Choose implementation='auto'.")
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    gates = gates.float().contiguous()
    batch, heads, length, head_dim = query.shape
    num_keys, query_start = key.shape[-2], int(query_start)
    if not 0 <= query_start <= num_keys - length:
        raise ValueError(f"{length} queries starting at position {query_start} do not fit {num_keys} keys.")
    cos, sin = rotations.cos_sin(num_keys, query.device)
    first, second = _pairs(rotations.layout)
    output = torch.zeros(batch, length, heads, value.shape[-1])
    decodes = length <= _MOST_DECODED
    tile_rows = min(_SCORES_IN_CACHE // num_keys // _TILE_STEP * _TILE_STEP, _MAX_TILE)
    problem = Problem(
        batch=batch,
        kv_heads=key.shape[1],
        group=heads // key.shape[1],
        queries=length,
        keys=num_keys,
        head_dim=head_dim,
        value_dim=value.shape[-1],
        experts=gates.shape[-1],
        pairs=len(first),
        query_start=query_start,
        is_causal=attention_mask is None,
        tile_rows=max(tile_rows, _TILE_STEP),
        picks=int((gates != 0).sum(dim=-1).max()) if decodes else 0,
        is_ordered=rotations.layout.start == 0 and not rotations.layout.interleaved,
        scaling=head_dim**-0.5 if scaling is None else scaling,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        table_stride=cos.stride(0),
        first=first.data_ptr(),
        second=second.data_ptr(),
        gates=gates.data_ptr(),
        output=output.data_ptr(),
    )
    if attention_mask is not None:
        mask = attention_mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        mask = _rows_contiguous(mask.float()).expand(batch, heads, length, -1)
        problem.mask, problem.mask_stride = mask.data_ptr(), Problem._Strides(*mask.stride()[:3])
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        setattr(problem, name, tensor.data_ptr())
        setattr(problem, f"{name}_stride", Problem._Strides(*tensor.stride()[:3]))
    library, threads = load(), torch.get_num_threads()
    scratch = torch.empty(library.scratch_size(ctypes.byref(problem), threads, decodes))
    problem.scratch = scratch.data_ptr()
    (library.decode if decodes else library.attend)(ctypes.byref(problem), threads)
    return output, None


def why_not_native(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> str | None:
    """The reason why [`native`] cannot compute a call with these arguments, or None."""
    reason = why_not_on_cpu(query, attention_mask, **kwargs)
    if reason is not None:
        return reason
    if query.dtype != torch.float32 or key.dtype != torch.float32 or value.dtype != torch.float32:
        return f"it works in float32, and the queries are in {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_DIM:
        return f"it knows head sizes up to {_MAX_HEAD_DIM}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, gates)):
        return "it has no backward pass"
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    library = load()
    return library if isinstance(library, str) else None


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _pairs(layout: RotaryLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The dimensions `[P]` that turn into one another."""
    dims = torch.arange(layout.start, layout.start + layout.size, dtype=torch.int32)
    first, second = (dims[0::2], dims[1::2]) if layout.interleaved else dims.chunk(2)
    return first.contiguous(), second.contiguous()
