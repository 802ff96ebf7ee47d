"""The operator by kernels in C: cost follows K, and decoding reads keys and values once."""

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...rope import RotaryLayout, RotationTable
from ..call import AttentionCall
from ..cpu_limits import first_position, why_not_on_cpu
from .library import Problem, load

_MAX_HEAD_DIM = 256
_MOST_DECODED = 8
"""Up to so many queries keys are not rotated; see `decode.c`."""
_FEWEST_ROTATIONS = 17
"""So many rows of the table of rotations are read, however few keys there are: one more than vectors have lanes."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    reason = why_not_on_cpu(call)
    if reason is not None:
        return reason
    if max(call.query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"it knows head sizes up to {_MAX_HEAD_DIM}"
    for name, tensor in {"queries": call.query, "keys": call.key, "values": call.value, "gates": call.gates}.items():
        if type(tensor) is not torch.Tensor:
            return f"it reads the memory of plain tensors, and the {name} are a {type(tensor).__name__}"
        if tensor.dtype not in _TYPES:
            return f"it computes in float32, and the {name} are in {tensor.dtype}"
    library = load()
    return library if isinstance(library, str) else None


def run(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Computes in float32, whatever the dtype of queries, keys and values is.

    For the backward pass the inputs are kept and nothing else. Besides them and the results, many queries need memory
    that does not grow with the length, the backward pass a few copies of the gradients of keys and values, and few
    queries `H · K · T` floats.
    """
    query, key, value = call.query, call.key, call.value
    if not query.dtype == key.dtype == value.dtype:
        query, key, value = query.float(), key.float(), value.float()
    gates, mask = call.gates.float(), call.attention_mask
    options = (call.rotations, first_position(call), call.scaling, call.is_causal)
    output: torch.Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, gates)):
        picked = call.picks()
        output = _NativeAttention.apply(query, key, value, gates, picked, mask, *options)  # type: ignore[no-untyped-call]
    else:
        output = _forward(query, key, value, gates, mask, *options)
    return output.to(call.query.dtype), None


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        query, key, value, gates, picked, mask, *options = inputs
        ctx.save_for_backward(query, key, value, gates, picked, mask)
        ctx.options = options
        return _forward(query, key, value, gates, mask, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, gates, picked, mask = ctx.saved_tensors
        kernel = _Kernel(query, key, value, gates, mask, *ctx.options)
        parts = kernel.count_parts()
        shapes = (query.shape, (parts, *key.shape), (parts, *value.shape), gates.shape)
        grad_query, grad_key, grad_value, grad_gates = (
            _empty(*shape) if wanted else None for shape, wanted in zip(shapes, ctx.needs_input_grad[:4], strict=True)
        )
        kernel.point(grad_output=grad_output.float().contiguous(), picked=picked.contiguous())
        kernel.point(grad_query=grad_query, grad_key=grad_key, grad_value=grad_value, grad_gates=grad_gates)
        kernel.run("differentiate")
        summed = (None if grad is None else grad.sum(dim=0) for grad in (grad_key, grad_value))
        grads = (None if grad is None else grad.to(query.dtype) for grad in (grad_query, *summed))
        return *grads, grad_gates, *(None,) * 6


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor, mask: Any, *options: Any
) -> torch.Tensor:
    output = _empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    kernel = _Kernel(query, key, value, gates, mask, *options)
    kernel.point(output=output)
    kernel.run("decode" if query.shape[-2] <= _MOST_DECODED else "attend")
    return output


class _Kernel:
    """A `Problem` with the tensors that its pointers lead to."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor,
        mask: torch.Tensor | None,
        rotations: RotationTable,
        query_start: int,
        scaling: float,
        is_causal: bool,
    ):
        batch, heads, length, head_dim = query.shape
        kv_heads, num_keys = key.shape[1], key.shape[2]
        layout = rotations.layout
        cos, sin = rotations.cos_sin(max(num_keys, _FEWEST_ROTATIONS), query.device)
        self.threads = torch.get_num_threads()
        self.problem = Problem()
        self._kept: list[torch.Tensor] = []
        self.problem.set(
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            queries=length,
            keys=num_keys,
            head_dim=head_dim,
            value_dim=value.shape[-1],
            experts=gates.shape[-1],
            pairs=cos.shape[-1],
            query_start=query_start,
            is_causal=is_causal,
            is_ordered=layout.start == 0 and not layout.interleaved,
            type=_TYPES[query.dtype],
            table_stride=cos.stride(0),
            scaling=scaling,
        )
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        self.point(query=query, key=key, value=value, gates=gates.contiguous(), cos=cos, sin=sin)
        self.point(order=_order(layout, head_dim))
        self.problem.set(query_stride=query.stride()[:3], key_stride=key.stride()[:3], value_stride=value.stride()[:3])
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.float()
            mask = mask.expand(batch, heads, length, num_keys)
            self.point(mask=mask)
            self.problem.set(mask_stride=mask.stride(), mask_is_boolean=mask.dtype == torch.bool)

    def point(self, **tensors: torch.Tensor | None) -> None:
        """Set pointers by the names of the problem's fields."""
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.problem.set(**{name: tensor.data_ptr() for name, tensor in found.items()})
        self._kept.extend(found.values())

    def count_parts(self) -> int:
        """In how many parts the backward pass leaves the gradients of keys and values."""
        parts: int = _library().count_parts(self.problem.packed(), self.threads)
        self.problem.set(parts=parts)
        return parts

    def run(self, name: str) -> None:
        """Call the C function of this name."""
        library = _library()
        scratch = _empty(getattr(library, f"{name}_floats")(self.problem.packed(), self.threads))
        self.point(scratch=scratch)
        getattr(library, name)(self.problem.packed(), self.threads)


def _library() -> Any:
    library = load()
    assert not isinstance(library, str), library
    return library


def _empty(*shape: int) -> torch.Tensor:
    """Memory that the kernels fill, whatever the defaults for dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@functools.cache
def _order(layout: RotaryLayout, head_dim: int) -> torch.Tensor:
    """The dimensions `[D]` as the kernels sort them: first of each pair, second of each pair, what does not rotate."""
    dims = list(range(head_dim))
    rotated = dims[layout.start : layout.start + layout.size]
    half = layout.size // 2
    first, second = (rotated[0::2], rotated[1::2]) if layout.interleaved else (rotated[:half], rotated[half:])
    rest = dims[: layout.start] + dims[layout.start + layout.size :]
    return torch.tensor(first + second + rest, dtype=torch.int32, device="cpu")
