"""Attention over keys that come in parts, joined by the log-sum-exps of their scores: each key is scored once.

PyTorch's operator for the CPU, the one behind its sdpa, gives log-sum-exps, without gradients. Those for GPUs nobody
has run. Single queries need none: their scores are few.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from .call import AttentionCall

_NAME = "_scaled_dot_product_flash_attention_for_cpu"
_HIDDEN = -3e4
"""Added to scores of hidden keys. Finite in every dtype, so that rows that see nothing have a log-sum-exp."""

Operator = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Maps `(query, key, value, bias, is_causal, scale)` of H heads to the output and log-sum-exps `[B, H, S]`."""


class Part(NamedTuple):
    """Queries `[B, H, S, D]`, and keys and values `[B, G, T, D]` that they see.

    Attributes:
        sees: "all"; of as many keys as queries those "up to" the query's own number, or those "after" it.
        mask: `[B or 1, 1 or H, S, T]`, boolean or additive, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sees: str = "all"
    mask: torch.Tensor | None = None


def operator_of(call: AttentionCall) -> Operator | None:
    """What gives log-sum-exps for the tensors of `call`, or None."""
    query = call.query
    if any(type(tensor) is not torch.Tensor for tensor in (query, call.key, call.value)):
        return None
    # PyTorch does not promise it.
    if call.key.shape[-1] == call.value.shape[-1] and query.device.type == "cpu" and hasattr(torch.ops.aten, _NAME):
        return _on_cpu
    return _by_products if query.shape[2] == 1 else None


def attend(parts: Sequence[Part], operator: Operator, scaling: float) -> torch.Tensor:
    """One softmax over the keys of all parts, whose queries are the same: `[B, S, H, D]`. The first is not "after"."""
    joined, sums = _attend(parts[0], operator, scaling)
    for number, part in enumerate(parts[1:], start=2):
        output, further = _attend(part, operator, scaling)
        weight = (further - sums).sigmoid()[..., None]
        joined = torch.lerp(joined.to(weight.dtype), output.to(weight.dtype), weight)
        if number < len(parts):
            sums = torch.logaddexp(sums, further)
    return joined.transpose(1, 2).to(parts[0].query.dtype)


def _attend(part: Part, operator: Operator, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, sees, mask = part
    if sees == "after":
        # Backwards, these are the keys up to the query's own number; the last query sees none.
        mask = None if mask is None else mask[:, :, :-1, 1:].flip(2, 3)
        backwards = query[:, :, :-1].flip(2), key[:, :, 1:].flip(2), value[:, :, 1:].flip(2)
        output, sums = _attend(Part(*backwards, "up to", mask), operator, scaling)
        return pad(output.flip(2), (0, 0, 0, 1)), pad(sums.flip(2), (0, 1), value=-torch.inf)
    shape, group = query.shape, query.shape[1] // key.shape[1]
    if sees == "all" and (mask is None or (shape[2] == 1 and mask.shape[1] == 1)):
        # Queries that see the same, in any order: those of heads with the same keys may follow each other.
        query = query.reshape(shape[0], key.shape[1], group * shape[2], shape[3])
    else:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    bias = None if mask is None else _bias(mask, query)
    output, sums = operator(query, key, value, bias, sees == "up to", scaling)
    return output.reshape(*shape[:3], -1), sums.reshape(shape[:3])


def _bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, T]` in the dtype of `query`."""
    bias = torch.where(mask, 0.0, _HIDDEN) if mask.dtype == torch.bool else mask.clamp(min=_HIDDEN)
    return bias.to(query.dtype).expand(*query.shape[:3], -1)


def _on_cpu(query: Any, key: Any, value: Any, bias: Any, is_causal: bool, scale: float) -> Any:
    operator = getattr(torch.ops.aten, _NAME)
    return operator(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For queries that see all keys: with memory for all scores, on any device."""
    assert not is_causal
    scores = ((query * scale) @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores if bias is None else scores + bias
    sums = scores.logsumexp(dim=-1)
    return (scores - sums[..., None]).exp().to(value.dtype) @ value, sums
