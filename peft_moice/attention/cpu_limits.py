"""What the implementations for the CPU leave to others."""

import torch

from .call import AttentionCall


def why_not_on_cpu(call: AttentionCall) -> str | None:
    """The reason why `grouped` and `native` cannot compute `call`, or None."""
    if call.query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {call.query.device.type!r}"
    return call.why_not_plain() or _why_not_now()


def _why_not_now() -> str | None:
    """The reason why nothing but PyTorch's own operations may run here, or None."""
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    if torch.jit.is_tracing():
        return "it cannot be traced by torch.jit.trace"
    # The transforms of torch.func (grad, vmap, jvp, ...) are active where there is a level of them.
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func cannot transform it"
    return None
