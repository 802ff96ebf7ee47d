"""`mixed_attention`, the table of its implementations, and the choice between them."""

import functools
import logging
import warnings
from reprlib import repr as shortened
from typing import Any

import torch

from ..rope import RotationTable
from . import delegated, folded, native, reference, triton
from .call import Attend, AttentionCall, Implementation

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference,
    "delegated": delegated,
    "folded": folded,
    "native": native,
    "triton": triton,
}

_REMOVED = ("grouped",)
"""Names that configs of earlier versions may hold, read as "auto"."""


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
        query_start: index of the first query among the keys, see [`AttentionCall`]. Default: 0.
        query_positions: `[B or 1, S]`, positions of the queries where they are not in the order of the keys. Default:
            None, query s stands at `query_start + s`.
        key_positions: `[B or 1, T]`, likewise; given together with `query_positions`.
        attend: the model's own attention, `attend(query, key, value, attention_mask, **options)`, returning the output
            `[B, S, H, Dv]` and the attention probabilities `[B, H, S, T]` or None. Needed by `"delegated"`.
        attention_mask: mask in the form that `attend` takes; None for causal attention without padding.
        picked: `[B, H, S, N]`, true where an expert is computed and its gate gets a gradient. Default: where the gate
            is not zero. Implementations whose cost does not follow K compute all.
        implementation: `"reference"` (float32, returns probabilities), `"delegated"` (`attend` once per expert),
            `"folded"` (`attend` once, with the experts as further heads; memory follows N), `"native"` (CPU; cost
            follows K; compiled on first use), `"triton"` (CUDA; cost follows K) or `"auto"` (default), see [`choose`].
        backend: name of the attention implementation behind `attend`, by which "auto" chooses.
        top_k: the most experts that a row picks, by which "auto" chooses. Default: N.
        options: further arguments of `attend`, such as `scaling` and `dropout`.

    Returns:
        Output `[B, S, H, Dv]` in the dtype of `query`, and the mixed attention probabilities `[B, H, S, T]`, or None
        where the implementation does not compute them.

    Raises:
        ValueError: unknown implementation, or one that cannot compute this call; tensors that do not fit each other.
    """
    tensors, places = (query, key, value, gates, rotations), (query_start, query_positions, key_positions)
    call = AttentionCall(*tensors, *places, attend, attention_mask, picked, backend, top_k, options)
    return compute(call, known_implementation(implementation))


def compute(call: AttentionCall, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[`mixed_attention`] for a call that is built, by a known implementation."""
    if name == "auto":
        chosen, reason = choose(call)
        if not torch.compiler.is_compiling():
            _say_once(chosen, reason)
        why_not = IMPLEMENTATIONS[chosen].why_not(call) if call.rotations.far is not None else None
        if why_not is not None:
            raise ValueError(
                f"Ropes by distance cannot be computed here: {why_not}. Load the model with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return IMPLEMENTATIONS[chosen].run(call)
    why_not = IMPLEMENTATIONS[name].why_not(call)
    if why_not is not None:
        raise ValueError(
            f"The {name} implementation cannot be used: {why_not}. Choose implementation='auto', which takes one that "
            "can."
        )
    return IMPLEMENTATIONS[name].run(call)


def known_implementation(name: Any) -> str:
    """`name`, if it is "auto" or that of an implementation.

    A name of an implementation that there is no more gives "auto", with a FutureWarning.

    Raises:
        ValueError: there is no implementation of this name.
    """
    if isinstance(name, str) and (name == "auto" or name in IMPLEMENTATIONS):
        return name
    if isinstance(name, str) and name in _REMOVED:
        warnings.warn(
            f"There is no implementation {name!r} any more, and it is read as 'auto'; a later version will refuse it.",
            FutureWarning,
            stacklevel=3,
        )
        return "auto"
    raise ValueError(f"Unknown implementation {shortened(name)}; choose 'auto' or one of {sorted(IMPLEMENTATIONS)}.")


def choose(call: AttentionCall) -> tuple[str, str]:
    """The implementation that "auto" takes for `call`, at least as precise as the model's own attention; and why."""
    if call.gates.shape[-1] == 1 and call.rotations.is_identity[0] and call.rotations.far is None:
        return "delegated", "there is the model's own angle alone"
    if call.query.device.type == "cuda":
        # Training would keep N copies of keys and values for each layer.
        if call.query.shape[-2] == 1 and not torch.is_grad_enabled() and folded.why_not(call) is None:
            return "folded", "on a GPU, one launch serves all angles of single queries"
        return "delegated", "on a GPU, the model's own attention runs once per angle"
    if call.backend != "sdpa":
        return "delegated", f"the model's attention is {call.backend!r}, and the kernels for the CPU stand in for sdpa"
    why_not = native.why_not(call)
    if why_not is None:
        return "native", "compiled for this CPU; its cost follows K"
    return "delegated", f"not native, because {why_not}"


@functools.cache
def _say_once(chosen: str, reason: str) -> None:
    logger.info("MoICE computes attention by %s (%s).", chosen, reason)
