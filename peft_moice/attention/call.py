"""`AttentionCall`: one call of the operator, built and checked once; and what the implementations of it offer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from ..rope import RotationTable
from ..rope.turned_keys import TurnedKeys

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""A model's own attention: maps `(query, key, value, attention_mask, **options)` to output and probabilities."""

_NOT_PLAIN = ("softcap", "s_aux", "position_bias")
"""Options that change what lies between scores and outputs."""


@dataclass
class AttentionCall:
    """What an implementation is asked to compute: the arguments of [`mixed_attention`], in its order, and what only
    models can say.

    Attributes:
        query_start: index of the first query among the keys: an int, a scalar tensor, or `[S]` such that query s
            stands at `query_start[s] + s`.
        options: further keyword arguments of `attend`.
        rows: for each expert the queries that may pick it, where that is known; else None.
        turned: keys that passes before have turned, if these keys begin with them; else None.

    Raises:
        ValueError: shapes that do not belong together, or queries that do not fit the keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gates: torch.Tensor
    rotations: RotationTable
    query_start: int | torch.Tensor = 0
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None
    attend: Attend | None = None
    attention_mask: Any = None
    picked: torch.Tensor | None = None
    backend: str | None = None
    top_k: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rows: tuple[slice, ...] | None = None
    turned: TurnedKeys | None = None

    def __post_init__(self) -> None:
        batch, heads, length, head_dim = self.query.shape
        kv_batch, kv_heads, num_keys, key_dim = self.key.shape
        expected = (batch, heads, length, self.rotations.num_experts)
        if self.gates.shape != expected or (self.picked is not None and self.picked.shape != expected):
            raise ValueError(
                f"gates have shape {tuple(self.gates.shape)} and picks "
                f"{None if self.picked is None else tuple(self.picked.shape)}, but queries of shape "
                f"{tuple(self.query.shape)} under {self.rotations.num_experts} base angles need {expected}."
            )
        if (
            self.value.shape[:3] != (batch, kv_heads, num_keys)
            or kv_batch != batch
            or key_dim != head_dim
            or heads % kv_heads
        ):
            raise ValueError(
                f"keys of shape {tuple(self.key.shape)} and values of shape {tuple(self.value.shape)} do not belong "
                f"to queries of shape {tuple(self.query.shape)}: batch, number of keys and head size have to agree, "
                "and the number of key-value heads has to divide that of query heads."
            )
        start = self.query_start
        if self.query_positions is not None or self.key_positions is not None:
            self._check_positions()
        elif isinstance(start, int) and not 0 <= start <= num_keys - length:
            raise ValueError(
                f"{length} queries starting at position {start} do not fit {num_keys} keys: the cache "
                "keeps keys in a layout whose positions cannot be told. Use one of transformers' own caches."
            )

    def _check_positions(self) -> None:
        batch, _, length, _ = self.query.shape
        for name, positions, size in (
            ("query", self.query_positions, length),
            ("key", self.key_positions, self.key.shape[2]),
        ):
            if positions is None:
                raise ValueError("`query_positions` and `key_positions` have to be given together.")
            if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != size:
                raise ValueError(
                    f"`{name}_positions` have shape {tuple(positions.shape)}, but need ({batch} or 1, {size})."
                )

    @property
    def num_experts(self) -> int:
        return self.rotations.num_experts

    @property
    def scaling(self) -> float:
        """Factor of the scores. Default: `D ** -0.5`."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees its own key and those before it, and no mask says what else."""
        return self.attention_mask is None and self.options.get("is_causal") is not False

    def rows_of(self, expert: int) -> slice:
        """The queries that may pick an expert."""
        return slice(0, self.query.shape[2]) if self.rows is None else self.rows[expert]

    def needs_gradients(self) -> bool:
        """Whether there will be a backward pass through attention."""
        tensors = (self.query, self.key, self.value, self.gates)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def picks(self) -> torch.Tensor:
        """`[B, H, S, N]`, true where an expert is computed and its gate gets a gradient."""
        return self.gates != 0 if self.picked is None else self.picked

    def run_attend(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's own attention for rotated `query` and `key`."""
        assert self.attend is not None
        output, probs = self.attend(query, key, self.value, self.attention_mask, **self.options)
        return output, probs

    def why_not_plain(self, any_mask: bool = False, any_positions: bool = False) -> str | None:
        """Why an implementation of our own that knows plain attention only cannot compute this, or None.

        Plain: causal or under a four-dimensional mask (or `any_mask`), positions in the order of the keys (or
        `any_positions`), nothing but the scores' scaling between queries, keys and softmax.
        """
        options = self.options
        no_plain = "it knows no dropout, softcap, attention sinks or position bias"
        if options.get("dropout"):
            return no_plain
        for name in _NOT_PLAIN:
            # Most options are not given at all.
            if name in options and options[name] is not None:
                return no_plain
        if forward_ad._current_level >= 0:
            return "it has no derivatives in forward mode"
        if options.get("output_attentions"):
            return "it does not give attention probabilities"
        if self.query_positions is not None and not any_positions:
            return "it reads positions in the order of the keys, and these tokens stand elsewhere"
        if isinstance(self.query_start, torch.Tensor) and self.query_start.dim() > 0:
            return "it reads one position for the first query, and packed sequences have one for each"
        if self.attention_mask is not None:
            return None if any_mask else self._why_not_mask()
        window = options.get("sliding_window")
        if window is not None and self.key.shape[2] > window:
            return "it reads a sliding window from the mask, and there is none; load the model with 'sdpa' or 'eager'"
        return None

    def _why_not_mask(self) -> str | None:
        mask = self.attention_mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return "it reads masks of four dimensions only"
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            return f"it reads boolean and additive masks, not {mask.dtype}"
        shape = (*self.query.shape[:3], self.key.shape[2])
        if any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
            return f"the mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}"
        if mask.requires_grad:
            return "it has no gradient for the mask"
        return None


def why_not_now() -> str | None:
    """The reason why nothing but PyTorch's public operations may run here, or None."""
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "it cannot be traced by torch.jit.trace"
    # The transforms of torch.func (grad, vmap, jvp, ...) are active where there is a level of them.
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func cannot transform it"
    return None


class Implementation(Protocol):
    """What the module of an implementation offers."""

    def why_not(self, call: AttentionCall) -> str | None:
        """The reason why [`run`] cannot compute `call`, or None."""

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output `[B, S, H, Dv]` and the mixed probabilities `[B, H, S, T]`, or None where it has none."""
