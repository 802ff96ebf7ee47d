"""Attention over keys that come in parts, joined by the log-sum-exps of their scores: each key is scored once.

PyTorch's operators give log-sum-exps, without gradients. It promises neither the operators nor what they return, so
one is taken only for kinds of tensors for which it has given right results. Single queries need none: their scores are
few.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from .call import AttentionCall

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
    query, found = call.query, None
    if any(type(tensor) is not torch.Tensor for tensor in (query, call.key, call.value)):
        return None
    if call.key.shape[-1] == call.value.shape[-1]:
        found = _operator(query.device, query.dtype, query.shape[-1], call.attention_mask is not None)
    return _by_products if found is None and query.shape[2] == 1 else found


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
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
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


@functools.cache
def _operator(device: torch.device, dtype: torch.dtype, size: int, has_mask: bool) -> Operator | None:
    """The operator, if it is right for heads of `size`. There is one for the CPU; those for GPUs nobody has run."""
    try:
        is_right = device.type == "cpu" and _is_right(_on_cpu, device, dtype, size, has_mask)
    except (RuntimeError, TypeError, AttributeError):  # this PyTorch has none
        is_right = False
    return _on_cpu if is_right else None


def _is_right(operator: Operator, device: torch.device, dtype: torch.dtype, size: int, has_mask: bool) -> bool:
    generator, tolerance = torch.Generator("cpu").manual_seed(0), 1e-4 if dtype.itemsize > 2 else 3e-2
    for sees, num_queries in (("all", 3), ("up to", 67), ("after", 67)):
        shapes = ((2, 4, num_queries, size), (2, 2, 67, size), (2, 2, 67, size))
        tensors = [torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for s in shapes]
        query, key, value = (x.to(device, dtype) for x in tensors)
        seen = torch.ones(2, 1, num_queries, 67, dtype=torch.bool, device=device)
        seen[1, :, :, :20] = not has_mask
        output, sums = _attend(Part(query, key, value, sees, seen if has_mask else None), operator, size**-0.5)
        order = torch.arange(67, device=device)
        if sees != "all":
            seen = seen & ((order[:, None] >= order) == (sees == "up to"))
        scores = query.double() @ key.double().repeat_interleave(2, 1).mT * size**-0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1).nan_to_num() @ value.double().repeat_interleave(2, 1)
        # A query that sees no key has any output, and nothing of it is taken.
        sees_some = seen.any(-1, keepdim=True)
        if not torch.allclose(output.double() * sees_some, expected * sees_some, rtol=0.0, atol=tolerance):
            return False
        wrong = (sums.double() - scores.logsumexp(-1)).abs() > tolerance
        if bool((wrong & sees_some[..., 0]).any()) or not bool(
            (sums[~sees_some[..., 0].expand_as(sums)] < -2e4).all()
        ):
            return False
    return True
