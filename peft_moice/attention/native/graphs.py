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


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor gates, Tensor picked, Tensor? mask, Tensor deltas, "
    "Tensor? query_start, SymInt offset, SymInt[] layout, float scaling, bool is_causal"
)
"""What both operators take. The first query stands at `query_start + offset`."""


@torch.library.custom_op("peft_moice::attend", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _attend(*inputs: Any) -> torch.Tensor:
    """The output `[B, S, H, Dv]` in float32."""
    query, key, value, gates, _, mask, *rest = inputs
    return forward(query, key, value, gates, mask, *_options(query, key, *rest))


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1], dtype=torch.float32)


@torch.library.custom_op(
    "peft_moice::differentiate",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_INPUTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _differentiate(grad_output: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of queries, keys, values and gates; without elements where not wanted."""
    query, key, value, gates, picked, mask, *rest, wanted = inputs
    options = _options(query, key, *rest)
    grads = differentiate(grad_output, query, key, value, gates, picked, mask, options, wanted)
    return tuple(x.new_empty(0) if grad is None else grad for grad, x in zip(grads, inputs[:4], strict=True))


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


def _options(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> tuple[RotationTable, int, float, bool]:
    """The table of rotations, the index of the first query, the scaling, and whether attention is causal.

    Raises:
        ValueError: queries that start there do not fit the keys.
    """
    deltas, query_start, offset, layout, scaling, is_causal = rest
    start = first_position(offset if query_start is None else query_start, query, key)
    return _table(deltas.numpy().tobytes(), deltas.shape[0], tuple(layout)), start, scaling, is_causal


@functools.lru_cache(maxsize=_MOST_TABLES)
def _table(deltas: bytes, num_experts: int, layout: tuple[int, ...]) -> RotationTable:
    start, size, interleaved = layout
    numbers = torch.frombuffer(bytearray(deltas), dtype=torch.float64).reshape(num_experts, -1)
    return RotationTable(numbers, RotaryLayout(start, size, bool(interleaved)))
