"""What the implementations for the CPU leave to others."""

import torch

from .call import AttentionCall


def why_not_on_cpu(call: AttentionCall, in_graph: bool = False) -> str | None:
    """The reason why `grouped` and `native` cannot compute `call`, or None.

    With `in_graph`, torch.compile is tracing the call, and the implementation has an operator for that.
    """
    if call.query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {call.query.device.type!r}"
    if 0 in (*call.query.shape, *call.value.shape):
        return "there is nothing to attend to"
    return call.why_not_plain() or (None if in_graph else _why_not_now())


def _why_not_now() -> str | None:
    """The reason why nothing but PyTorch's own operations may run here, or None."""
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "it cannot be traced by torch.jit.trace"
    # The transforms of torch.func (grad, vmap, jvp, ...) are active where there is a level of them.
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func cannot transform it"
    return None


def first_position(call: AttentionCall) -> int:
    """The index of the first query among the keys.

    Raises:
        ValueError: it is given on the device, and queries that start there do not fit the keys.
    """
    start, length, num_keys = int(call.query_start), call.query.shape[-2], call.key.shape[-2]
    if not 0 <= start <= num_keys - length:
        raise ValueError(f"{length} queries starting at position {start} do not fit {num_keys} keys.")
    return start
