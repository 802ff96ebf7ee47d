"""`mixed_attention`, the table of its implementations, and the choice between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..rope import RotationTable
from . import delegated, folded, grouped, native, reference, triton
from .call import Attend, AttentionCall, Implementation
from .certification import CERTIFICATES

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference,
    "delegated": delegated,
    "folded": folded,
    "grouped": grouped,
    "native": native,
    "triton": triton,
}

_FEWEST_KEYS_TO_GROUP = 2048
"""For single queries that meet fewer keys, sorting rows by expert costs more than attention for all."""

_OBSERVERS: list[Callable[[str, str], None]] = []


def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor = 0,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    attend: Attend | None = None,
    attention_mask: Any = None,
    picked: torch.Tensor | None = None,
    implementation: str = "auto",
    backend: str | None = None,
    top_k: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under N base angles at once, mixed per head and token: `Σ_j p_j softmax(R_j(q) R_j(k)ᵀ) v`.

    (Paper, equation 4; the sum of outputs equals attention with mixed probabilities.)

    Args:
        query: `[B, H, S, D]`, carrying the model's own rotation.
        key: `[B, G, T, D]`, likewise; G divides H.
        value: `[B, G, T, Dv]`.
        gates: `[B, H, S, N]`, weights of the experts, summing to one.
        rotations: further rotations of the N experts.
        query_start: index of the first query among the keys, see [`positions.query_start`]. Default: 0.
        query_positions: `[B or 1, S]`, positions of the queries where they are not in the order of the keys. Default:
            None, query s stands at `query_start + s`.
        key_positions: `[B or 1, T]`, likewise; given together with `query_positions`.
        attend: the model's own attention, `attend(query, key, value, attention_mask, **options)`, returning the output
            `[B, S, H, Dv]` and the attention probabilities `[B, H, S, T]` or None. Needed by `"delegated"`.
        attention_mask: mask in the form that `attend` takes; None for causal attention without padding.
        picked: `[B, H, S, N]`, true where an expert is computed and its gate gets a gradient. Default: where the gate
            is not zero. Implementations whose cost does not follow K compute all.
        implementation: `"reference"` (float32, returns probabilities), `"delegated"` (`attend` once per expert),
            `"folded"` (`attend` once, with the experts as further heads; memory follows N), `"grouped"` (CPU; cost
            follows K), `"native"` (CPU; cost follows K; compiled on first use), `"triton"` (CUDA; cost follows K) or
            `"auto"` (default), which measures on a GPU, see [`certification`], and has a fixed rule on the CPU.
        backend: name of the attention implementation behind `attend`, by which "auto" chooses.
        top_k: the most experts that a row picks, by which "auto" chooses. Default: N.
        options: further arguments of `attend`, such as `scaling` and `dropout`.

    Returns:
        Output `[B, S, H, Dv]` in the dtype of `query`, and the mixed attention probabilities `[B, H, S, T]`, or None
        where the implementation does not compute them.

    Raises:
        ValueError: unknown implementation, or one that cannot compute this call; tensors that do not fit each other.
    """
    call = AttentionCall(
        query,
        key,
        value,
        gates,
        rotations,
        query_start,
        query_positions,
        key_positions,
        attend,
        attention_mask,
        picked,
        backend,
        top_k,
        options,
    )
    if implementation == "auto":
        name = choose(call)
        if not torch.compiler.is_compiling():
            for observer in list(_OBSERVERS):
                observer(name, why(call, name))
        return IMPLEMENTATIONS[name].run(call)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {implementation!r}; choose 'auto' or one of {sorted(IMPLEMENTATIONS)}."
        )
    reason = IMPLEMENTATIONS[implementation].why_not(call)
    if reason is None and implementation == "triton" and call.query.device.type == "cuda":
        reason = CERTIFICATES.fault("triton", call)
    if reason is not None:
        raise ValueError(
            f"The {implementation} implementation cannot be used: {reason}. Choose implementation='auto', which takes "
            "one that can."
        )
    return IMPLEMENTATIONS[implementation].run(call)


def choose(call: AttentionCall) -> str:
    """The name of the fastest implementation that computes what the backend would, at least in the same precision."""
    if call.num_experts == 1:
        return "delegated"
    if call.query.device.type == "cuda":
        return "delegated" if torch.compiler.is_compiling() else _choose_on_gpu(call)
    if call.backend != "sdpa":
        return "delegated"
    if native.why_not(call) is None:
        return "native"
    # Without a compiler. By examples/benchmarks/measure_attention.py; where every expert is picked, it is no faster.
    is_long = call.query.shape[-2] > 1 or call.key.shape[-2] >= _FEWEST_KEYS_TO_GROUP
    picks_some = call.top_k is not None and call.top_k < call.num_experts
    in_float32 = call.query.dtype == call.value.dtype == torch.float32
    return "grouped" if is_long and picks_some and in_float32 and grouped.why_not(call) is None else "delegated"


def why(call: AttentionCall, chosen: str) -> str:
    """Why [`choose`] has chosen an implementation for a call, for messages."""
    if call.num_experts == 1:
        return "there is a single angle"
    if call.query.device.type == "cuda":
        return "the fastest of those that are right on this GPU, by measurement"
    if call.backend != "sdpa":
        return f"the model's attention is {call.backend!r}, and the kernels for the CPU stand in for sdpa only"
    if chosen == "native":
        return "compiled for this CPU; its cost follows K"
    reasons = {"native": native.why_not(call)} | ({"grouped": grouped.why_not(call)} if chosen == "delegated" else {})
    return "; ".join(f"not {name}, because {reason}" for name, reason in reasons.items() if reason)


@contextmanager
def observing_choices(observer: Callable[[str, str], None]) -> Iterator[None]:
    """Call `observer` with the name of the implementation that "auto" chooses, and why, at each choice inside."""
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def _choose_on_gpu(call: AttentionCall) -> str:
    """The fastest, by measurement, of the model's own attention and the kernels that are right on this device."""
    candidates: dict[str, Implementation] = {"delegated": delegated}
    # Training would keep N copies of keys and values for each layer.
    if not torch.is_grad_enabled() and folded.why_not(call) is None:
        candidates["folded"] = folded
    plain_backend = call.backend in ("sdpa", "flash_attention_2", "flash_attention_3")
    if plain_backend and triton.why_not(call) is None and CERTIFICATES.fault("triton", call) is None:
        candidates["triton"] = triton
    return CERTIFICATES.fastest(candidates, call)
