"""The positions that a rotary embedding was given, on their way to the layers that use its cosines.

They travel with the cosines themselves, and not on a module, because the second run of gradient checkpointing and
other threads would find those of another pass there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .order import Order

_ATTRIBUTE = "_moice_positions"


@dataclass(eq=False)
class ToldPositions:
    """The positions that a rotary embedding was given. They travel with its output, to the layers that use it.

    Attributes:
        ids: `[B or 1, S]`, or `[dimensions, B or 1, S]` where positions have several dimensions (mRoPE).
        token: an object that no other pass has; None where that is not known.
        orders: what was found out for all layers of the pass, by mask and place of the queries.
        is_text: likewise, whether all dimensions agree.
        span: likewise, the smallest and the greatest of them.
    """

    ids: torch.Tensor
    token: object | None = field(default_factory=object)
    orders: list[tuple[Any, tuple[int, int | None], Order]] = field(default_factory=list)
    is_text: bool = False
    span: tuple[int, int] | None = None

    def of_tokens(self, batch: int, num_tokens: int) -> torch.Tensor | None:
        """`ids` as `[B or 1, S]`, of the first of several dimensions; None if of other tokens."""
        ids = self.ids[0] if self.ids.dim() == 3 else self.ids
        fits = ids.dim() == 2 and ids.shape[0] in (1, batch) and ids.shape[1] == num_tokens
        return ids if fits and not ids.is_meta else None


def can_look(ids: torch.Tensor) -> bool:
    """Whether values may be read: free on a CPU; elsewhere prompts may wait for the device, single tokens may not."""
    return ids.device.type == "cpu" or ids.shape[-1] > 1


def tell_positions(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of rotary embeddings: lets the positions travel with the cosines."""
    if torch.compiler.is_compiling():
        return
    ids, told = kwargs.get("position_ids", args[1] if len(args) > 1 else None), _first_tensor(output)
    if isinstance(ids, torch.Tensor) and ids.dim() > 1 and told is not None:
        setattr(told, _ATTRIBUTE, ToldPositions(ids))


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def positions_told(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ToldPositions | None:
    """The positions of this pass: those that the rotary embedding was given, else the layer's own argument."""
    if not torch.compiler.is_compiling():
        for value in (*kwargs.values(), *args):
            told: ToldPositions | None = getattr(_first_tensor(value), _ATTRIBUTE, None)
            if told is not None:
                return told
    ids = kwargs.get("position_ids")
    return ToldPositions(ids, token=None) if isinstance(ids, torch.Tensor) and ids.dim() > 1 else None
