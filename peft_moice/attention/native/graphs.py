"""The kernels as operators of PyTorch, which graphs of `torch.compile` call.

Graphs cannot follow code that reads memory by its address. They see two operators, whose tables of rotations are made
from the inverse frequencies when they run, and kept.
"""

import functools
from typing import Any

import torch

from ...rope import RotaryLayout, RotationTable
from ..call import AttentionCall
from .kernel import differentiate, first_position, forward

_MOST_TABLES = 16
"""Tables kept, one for each set of rope bases and layout."""


@torch.library.custom_op("peft_moice::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    picked: torch.Tensor,
    mask: torch.Tensor | None,
    deltas: torch.Tensor,
    query_start: torch.Tensor | None,
    offset: int,
    layout: list[int],
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """The output `[B, S, H, Dv]` in float32. The first query stands at `query_start + offset`."""
    options = _options(key, query, deltas, query_start, offset, layout)
    return forward(query, key, value, gates, mask, *options, scaling, is_causal)


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1], dtype=torch.float32)


@torch.library.custom_op("peft_moice::differentiate", mutates_args=())
def _differentiate(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    picked: torch.Tensor,
    mask: torch.Tensor | None,
    deltas: torch.Tensor,
    query_start: torch.Tensor | None,
    offset: int,
    layout: list[int],
    scaling: float,
    is_causal: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys, values and gates; without elements where not wanted."""
    options = _options(key, query, deltas, query_start, offset, layout)
    grads = differentiate(grad_output, query, key, value, gates, picked, mask, (*options, scaling, is_causal), wanted)
    found = [
        x.new_empty(0) if grad is None else grad for grad, x in zip(grads, (query, key, value, gates), strict=True)
    ]
    return found[0], found[1], found[2], found[3]


@_differentiate.register_fake
def _(grad_output: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    wanted = inputs[-1]
    return tuple(x.new_empty(x.shape if is_wanted else 0) for x, is_wanted in zip(inputs[:4], wanted, strict=True))


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.offset, ctx.layout, ctx.scaling, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    options = (ctx.offset, ctx.layout, ctx.scaling, ctx.is_causal)
    grads = _differentiate(grad_output, *ctx.saved_tensors, *options, wanted)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *(None,) * 8


_attend.register_autograd(_backward, setup_context=_set_up)


def run(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """The output `[B, S, H, Dv]` in float32 of a call that is being compiled, for its tensors of one dtype."""
    layout, start = call.rotations.layout, call.query_start
    is_tensor = isinstance(start, torch.Tensor)
    output: torch.Tensor = _attend(
        query,
        key,
        value,
        gates,
        call.picks(),
        call.attention_mask,
        call.rotations.deltas,
        start if is_tensor else None,
        0 if is_tensor else start,
        [layout.start, layout.size, int(layout.interleaved)],
        call.scaling,
        call.is_causal,
    )
    return output


def _options(
    key: torch.Tensor,
    query: torch.Tensor,
    deltas: torch.Tensor,
    query_start: torch.Tensor | None,
    offset: int,
    layout: list[int],
) -> tuple[RotationTable, int]:
    """The table of rotations and the index of the first query.

    Raises:
        ValueError: queries that start there do not fit the keys.
    """
    start = first_position(offset if query_start is None else query_start, query, key)
    return _table(deltas.numpy().tobytes(), deltas.shape[0], tuple(layout)), start


@functools.lru_cache(maxsize=_MOST_TABLES)
def _table(deltas: bytes, num_experts: int, layout: tuple[int, ...]) -> RotationTable:
    start, size, interleaved = layout
    numbers = torch.frombuffer(bytearray(deltas), dtype=torch.float64).reshape(num_experts, -1)
    return RotationTable(numbers, RotaryLayout(start, size, bool(interleaved)))
