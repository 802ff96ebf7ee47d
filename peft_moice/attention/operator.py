"""`mixed_attention` and the choice between its implementations."""

from collections.abc import Callable

import torch

from ..rope import RotationTable
from .cpu_limits import why_not_on_cpu
from .delegated import delegated
from .grouped import grouped
from .native import native, why_not_native
from .reference import reference
from .triton import triton_attention

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "delegated": delegated,
    "grouped": grouped,
    "native": native,
    "triton": triton_attention,
}


def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    attend: Callable,
    attention_mask=None,
    picked: torch.Tensor | None = None,
    implementation: str = "auto",
    backend: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under N base angles at once, mixed per head and token: `Σ_j p_j softmax(R_j(q) R_j(k)ᵀ) v`.

    (Paper, equation 4; the sum of outputs equals attention with mixed probabilities.)

    Args:
        query: `[B, H, S, D]`, carrying the model's own rotation.
        key: `[B, G, T, D]`, likewise; G divides H.
        value: `[B, G, T, Dv]`.
        gates: `[B, H, S, N]`, weights of the experts, summing to one.
        rotations: further rotations of the N experts.
        query_start: index of the first query among the keys, see [`positions.query_start`].
        attend: the model's own attention, `attend(query, key, value, attention_mask, **kwargs)`, returning the output
            `[B, S, H, Dv]` and the attention probabilities `[B, H, S, T]` or None.
        attention_mask: mask in the form that `attend` takes; None for causal attention without padding.
        picked: `[B, H, S, N]`, true where an expert is computed and its gate gets a gradient. Default: where the gate
            is not zero. Implementations whose cost does not follow K compute all.
        implementation: `"reference"` (float32, returns probabilities), `"delegated"` (`attend` once per expert),
            `"grouped"` (CPU; cost follows K), `"native"` (CPU, float32; cost follows K; compiled on first use),
            `"triton"` (CUDA; cost follows K; never run on a GPU yet, so "auto" does not choose it) or `"auto"`
            (default).
        backend: name of the attention implementation behind `attend`, by which "auto" chooses.
        kwargs: further arguments of `attend`, such as `scaling` and `dropout`.

    Returns:
        Output `[B, S, H, Dv]` in the dtype of `query`, and the mixed attention probabilities `[B, H, S, T]`, or None
        where the implementation does not compute them.

    Raises:
        ValueError: unknown implementation, gates that do not fit, or a mask that the implementation cannot read.
    """
    if gates.shape != (*query.shape[:3], rotations.num_experts):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}, but queries of shape {tuple(query.shape)} under "
            f"{rotations.num_experts} angles need {(*query.shape[:3], rotations.num_experts)}."
        )
    if implementation == "auto":
        implementation = _choose(query, value, gates, attention_mask, backend, **kwargs)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {implementation!r}; choose 'auto' or one of {sorted(IMPLEMENTATIONS)}."
        )
    return IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        gates,
        rotations=rotations,
        query_start=query_start,
        attend=attend,
        attention_mask=attention_mask,
        picked=picked,
        **kwargs,
    )


def _choose(query, value, gates: torch.Tensor, attention_mask, backend: str | None, **kwargs) -> str:
    """The fastest implementation that computes what the backend would, in the same precision."""
    in_place_of_sdpa = backend == "sdpa" and query.dtype == value.dtype == torch.float32
    if not in_place_of_sdpa or gates.shape[-1] == 1 or torch.compiler.is_compiling():
        return "delegated"
    if why_not_native(query, value, attention_mask, **kwargs) is None:
        return "native"
    mixes_a_sequence = query.shape[-2] > 1 and why_not_on_cpu(query, attention_mask, **kwargs) is None
    return "grouped" if mixes_a_sequence else "delegated"
