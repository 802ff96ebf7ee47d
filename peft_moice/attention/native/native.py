"""The operator by the kernels of `kernels.c`: cost follows K, and decoding reads keys and values once."""

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from ...rope import RotaryLayout, RotationTable
from ..call import AttentionCall
from ..cpu_limits import why_not_on_cpu
from ..masks import additive
from .library import Problem, load

_MAX_HEAD_DIM = 256
_MOST_DECODED = 8
_SCORES_IN_CACHE = 1 << 16
_TILE_STEP, _MAX_TILE = 6, 48


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    reason = why_not_on_cpu(call)
    if reason is not None:
        return reason
    if max(call.query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"it knows head sizes up to {_MAX_HEAD_DIM}"
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    if type(call.query) is not torch.Tensor:
        return f"it reads the memory of plain tensors, and the queries are a {type(call.query).__name__}"
    library = load()
    return library if isinstance(library, str) else None


def run(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Causal, or under a four-dimensional mask; works in float32.

    For the backward pass the inputs are kept and nothing else. The pass itself needs `threads · N · T · D` floats for
    the gradients of one key-value head's keys.
    """
    mask = None if call.attention_mask is None else additive(call.attention_mask, torch.float32)
    tensors = (call.query.float(), call.key.float(), call.value.float(), call.gates.float())
    output = _NativeAttention.apply(*tensors, call.picks(), mask, call.rotations, int(call.query_start), call.scaling)
    return output.to(call.query.dtype), None


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, gates, picked, mask, *options):
        ctx.save_for_backward(query, key, value, gates, picked, mask)
        ctx.options = options
        output = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        decodes = query.shape[-2] <= _MOST_DECODED
        with _Call(query, key, value, gates, mask, *options, decodes=decodes) as call:
            call.point(output=output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        *tensors, gates, picked, mask = ctx.saved_tensors
        grads = [
            torch.zeros(x.shape) if needed else None
            for x, needed in zip((*tensors, gates), ctx.needs_input_grad[:4], strict=True)
        ]
        with _Call(*tensors, gates, mask, *ctx.options) as call:
            call.point(grad_output=grad_output.contiguous(), picked=picked.contiguous())
            names = ("grad_query", "grad_key", "grad_value", "grad_gates")
            call.point(**{name: grad for name, grad in zip(names, grads, strict=True) if grad is not None})
        return *grads, *(None,) * 5


class _Call:
    """A `Problem` whose pointers are filled in inside a `with` block, at the end of which the kernel runs."""

    def __init__(self, query, key, value, gates, mask, rotations: RotationTable, query_start, scaling, decodes=False):
        batch, heads, length, head_dim = query.shape
        num_keys = key.shape[-2]
        cos, sin = rotations.cos_sin(num_keys, query.device)
        first, second = _pairs(rotations.layout)
        self.decodes = decodes
        self.problem = Problem(
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
            is_causal=mask is None,
            tile_rows=_tile_rows(_SCORES_IN_CACHE // (2 * num_keys)),
            single_tile_rows=_tile_rows(_SCORES_IN_CACHE // num_keys),
            is_ordered=rotations.layout.start == 0 and not rotations.layout.interleaved,
            table_stride=cos.stride(0),
            scaling=scaling,
        )
        self.kept = []
        self.point(gates=gates.contiguous(), cos=cos, sin=sin, first=first, second=second)
        strided = {"query": query, "key": key, "value": value}
        if mask is not None:
            strided["mask"] = _rows_contiguous(mask).expand(batch, heads, length, -1)
        for name, tensor in strided.items():
            tensor = _rows_contiguous(tensor)
            self.point(**{name: tensor})
            setattr(self.problem, f"{name}_stride", Problem.Strides(*tensor.stride()[:3]))

    def point(self, **tensors: torch.Tensor) -> None:
        """Set pointers by the names of the problem's fields."""
        for name, tensor in tensors.items():
            setattr(self.problem, name, tensor.data_ptr())
            self.kept.append(tensor)

    def __enter__(self) -> "_Call":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None:
            return
        library, threads, problem = load(), torch.get_num_threads(), ctypes.byref(self.problem)
        self.point(scratch=torch.empty(library.scratch_size(problem, threads, self.decodes)))
        (library.decode if self.decodes else library.attend)(problem, threads)


def _tile_rows(rows: int) -> int:
    return max(min(rows // _TILE_STEP * _TILE_STEP, _MAX_TILE), _TILE_STEP)


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _pairs(layout: RotaryLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The dimensions `[P]` that turn into one another."""
    dims = torch.arange(layout.start, layout.start + layout.size, dtype=torch.int32)
    first, second = (dims[0::2], dims[1::2]) if layout.interleaved else dims.chunk(2)
    return first.contiguous(), second.contiguous()
