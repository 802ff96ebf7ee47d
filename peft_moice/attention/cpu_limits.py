"""What the implementations for the CPU leave to others."""

import torch


def why_not_on_cpu(
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> str | None:
    """The reason why `grouped`, `blended` and `pairwise` cannot compute a call with these arguments, or None."""
    if query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {query.device.type!r}"
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4):
        return "it reads masks of four dimensions only"
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        return "it knows no dropout, softcap, attention sinks or position bias"
    if is_causal is False and attention_mask is None:
        return "it is causal"
    if output_attentions:
        return "it does not give attention probabilities"
    return None
