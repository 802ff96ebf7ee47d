"""Calls of the C functions: output of attention, and gradients."""

import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from ...rope import RotationTable
from .library import Structure, load

_MOST_DECODED = 8
"""Up to so many queries `decode.c` is faster than `attend.c`."""
_FEWEST_ROTATIONS = 17
"""So many rows of the table of rotations are read, however few keys there are: one more than vectors have lanes."""
_NO_MASK = (0, 0, 0, 0, 0, 0)
"""Where there is none: its pointer, four strides, and whether it is boolean."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of queries, keys and values, as `kernels.h` numbers them."""


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor, mask: Any, *options: Any
) -> torch.Tensor:
    """The output `[B, S, H, Dv]` in float32.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, G, T, D]`, in the dtype of `query`.
        value: `[B, G, T, Dv]`, likewise.
        gates: `[B, H, S, N]` in float32; an expert whose gate is 0 is not computed.
        mask: four-dimensional, boolean or additive, or None.
        options: the table of rotations, the index of the first query, the scaling, and whether attention is causal.
    """
    output = _empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    kernel = _Kernel(query, key, value, gates, mask, *options)
    kernel.point(output=output)
    kernel.run("decode" if query.shape[-2] <= _MOST_DECODED else "attend")
    return output


def differentiate(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    picked: torch.Tensor,
    mask: Any,
    options: tuple[Any, ...],
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients of queries, keys, values and gates in their dtypes; None where not `wanted`. See [`forward`].

    `grad_output` is that of the output, `[B, S, H, Dv]`, and `picked` `[B, H, S, N]` true where a gate has a gradient.
    """
    kernel = _Kernel(query, key, value, gates, mask, *options)
    parts = kernel.count_parts()
    shapes = (query.shape, (parts, *key.shape), (parts, *value.shape), gates.shape)
    grad_query, grad_key, grad_value, grad_gates = (
        _empty(*shape) if is_wanted else None for shape, is_wanted in zip(shapes, wanted, strict=True)
    )
    kernel.point(grad_output=grad_output.float().contiguous(), picked=picked.contiguous())
    kernel.point(grad_query=grad_query, grad_key=grad_key, grad_value=grad_value, grad_gates=grad_gates)
    kernel.run("differentiate")
    summed = (None if grad is None else grad.sum(dim=0) for grad in (grad_key, grad_value))
    return [*(None if grad is None else grad.to(query.dtype) for grad in (grad_query, *summed)), grad_gates]


def first_position(query_start: int | torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> int:
    """The index of the first query among the keys.

    Raises:
        ValueError: queries that start there do not fit the keys.
    """
    start, length, num_keys = int(query_start), query.shape[-2], key.shape[-2]
    if not 0 <= start <= num_keys - length:
        raise ValueError(f"{length} queries starting at position {start} do not fit {num_keys} keys.")
    return start


class _Kernel:
    """A [`Structure`] with the tensors that its pointers lead to."""

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
        _, kv_heads, num_keys, value_dim = value.shape
        # Their last dimension in one piece.
        query, key, value = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        gates = gates.contiguous()
        layout, num_experts = rotations.layout, gates.shape[-1]
        cos, sin = rotations.at_least(max(num_keys, _FEWEST_ROTATIONS), query.device)
        order = _order(layout.start, layout.size, layout.interleaved, head_dim)
        self.threads = torch.get_num_threads()
        self._kept: list[Any] = [query, key, value, gates, cos, sin]
        is_ordered = layout.start == 0 and not layout.interleaved
        # In the order of the fields, up to the last one that every call has.
        self.problem = Structure(
            *(batch, kv_heads, heads // kv_heads, length, num_keys, head_dim, value_dim, num_experts, cos.shape[-1]),
            *(query_start, is_causal, is_ordered, TYPES[query.dtype]),
            *(query.data_ptr(), *query.stride()[:3], key.data_ptr(), *key.stride()[:3]),
            *(value.data_ptr(), *value.stride()[:3], gates.data_ptr(), *_NO_MASK),
            *(cos.data_ptr(), sin.data_ptr(), cos.stride(0), order.data_ptr(), scaling),
        )
        if rotations.far is not None:
            starts, factors = array("q", rotations.far.starts), array("f", rotations.far.factors)
            self._kept += [starts, factors]
            self.problem.set({"far_from": starts.buffer_info()[0], "factors": factors.buffer_info()[0]})
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.float()
            mask = mask.expand(batch, heads, length, num_keys)
            self.point(mask=mask)
            self.problem.set({"mask_stride": mask.stride(), "mask_is_boolean": mask.dtype == torch.bool})

    def point(self, **tensors: torch.Tensor | None) -> None:
        """Set further pointers by the names of the problem's fields."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.problem.set({name: tensor.data_ptr()})
                self._kept.append(tensor)

    def count_parts(self) -> int:
        """In how many parts the backward pass leaves the gradients of keys and values."""
        library: Any = load()
        parts: int = library.count_parts(self.problem.packed(), self.threads)
        self.problem.set({"parts": parts})
        return parts

    def run(self, name: str) -> None:
        """Call the C function of this name."""
        library: Any = load()
        scratch = _empty(getattr(library, f"{name}_floats")(self.problem.packed(), self.threads))
        self.point(scratch=scratch)
        getattr(library, name)(self.problem.packed(), self.threads)


def _empty(*shape: int) -> torch.Tensor:
    """Memory that the kernels fill, whatever the defaults for dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@functools.cache
def _order(start: int, size: int, interleaved: bool, head_dim: int) -> torch.Tensor:
    """The dimensions `[D]` as the kernels sort them: first of each pair, second of each pair, what does not rotate."""
    dims = list(range(head_dim))
    rotated = dims[start : start + size]
    half = size // 2
    first, second = (rotated[0::2], rotated[1::2]) if interleaved else (rotated[:half], rotated[half:])
    rest = dims[:start] + dims[start + size :]
    return torch.tensor(first + second + rest, dtype=torch.int32, device="cpu")
