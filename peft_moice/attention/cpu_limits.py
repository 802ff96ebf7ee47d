"""What the implementations for the CPU leave to others."""

from .call import AttentionCall


def why_not_on_cpu(call: AttentionCall) -> str | None:
    """The reason why `grouped` and `native` cannot compute `call`, or None."""
    if call.query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {call.query.device.type!r}"
    if call.attention_mask is None and not call.is_causal:
        return "it is causal"
    return call.why_not_plain()
