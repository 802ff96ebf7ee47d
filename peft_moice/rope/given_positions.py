"""The positions that a rotary embedding was given, on their way to the layers that use its cosines.

They travel with the cosines themselves, and not on a module, because the second run of gradient checkpointing and
other threads would find those of another pass there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .key_order import Order
from .keys_left import version_of

_ATTRIBUTE = "_moice_positions"


PassMark = tuple[torch.Tensor, int | None, object | None]
"""What tells one pass from another: the positions, their version (loops may keep one buffer for them), and a token."""


@dataclass(eq=False)
class GivenPositions:
    """The positions that a rotary embedding was given. They travel with its output, to the layers that use it.

    Attributes:
        ids: `[B or 1, S]`, or `[dimensions, B or 1, S]` where positions have several dimensions (mRoPE).
        token: an object that no other call of a rotary embedding has; None where that is not known.
        orders: what was found out for all layers of the pass, by mask and place of the queries.
        is_text: likewise, whether all dimensions agree.
    """

    ids: torch.Tensor
    token: object | None = field(default_factory=object)
    orders: list[tuple[Any, tuple[int, int], Order]] = field(default_factory=list)
    is_text: bool = False
    _extent: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _rows: dict[tuple[int, int | None], slice] = field(default_factory=dict, init=False, repr=False)

    @property
    def mark(self) -> PassMark:
        """Models with several rotary embeddings give the same `ids` to all of them."""
        return self.ids, version_of(self.ids), self.token

    def of_tokens(self, batch: int, num_tokens: int) -> torch.Tensor | None:
        """`ids` as `[B or 1, S]`, of the first of several dimensions; None if of other tokens."""
        ids = self.ids[0] if self.ids.dim() == 3 else self.ids
        fits = ids.dim() == 2 and ids.shape[0] in (1, batch) and ids.shape[1] == num_tokens
        return ids if fits and not ids.is_meta else None

    def extent(self) -> tuple[int, int]:
        """The least and the greatest of `ids`, looked at once for all layers."""
        if self._extent is None:
            least, greatest = self.ids.aminmax()
            self._extent = int(least), int(greatest)
        return self._extent

    def rows_between(self, first: int, end: int | None) -> slice:
        """The smallest range of tokens with all at positions from `first` to `end`, looked at once for all layers."""
        least, greatest = self.extent()
        if least >= first and (end is None or greatest < end):
            return slice(0, self.ids.shape[-1])
        if (first, end) not in self._rows:
            holds = (self.ids >= first) & (self.ids < (greatest + 1 if end is None else end))
            indices = holds.reshape(-1, holds.shape[-1]).any(dim=0).nonzero()
            found = slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)
            self._rows[first, end] = found
        return self._rows[first, end]

    def order_of(self, mask: Any, place: tuple[int, int], judge: Callable[[], Order]) -> Order:
        """What `judge` finds out for queries under `mask` at a place among the keys, asked once for all layers."""
        for known_mask, known_place, order in self.orders:
            if known_mask is mask and known_place == place:
                return order
        self.orders.append((mask, place, judge()))
        return self.orders[-1][-1]

    def refuse_several_dimensions(self) -> None:
        """Raise a ValueError if the positions of a token differ from dimension to dimension (mRoPE)."""
        if self.ids.dim() < 3 or self.is_text or not can_look(self.ids):
            return
        differs = (self.ids != self.ids[:1]).any(dim=0).any(dim=-1)
        self.is_text = not bool(differs.any())
        if not self.is_text:
            raise ValueError(
                f"Row {int(differs.nonzero()[0])} has positions in more than one dimension (mRoPE), as images and "
                "videos do. MoICE can only rotate text positions: use text alone, or `disable_adapter()`."
            )


def can_look(ids: torch.Tensor) -> bool:
    """Whether values may be read: free on a CPU; elsewhere prompts may wait for the device, single tokens may not."""
    return ids.device.type == "cpu" or ids.shape[-1] > 1


def give_positions(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of rotary embeddings: lets the positions travel with the cosines."""
    if torch.compiler.is_compiling():
        return
    ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    cosines = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(ids, torch.Tensor) and ids.dim() > 1 and isinstance(cosines, torch.Tensor):
        setattr(cosines, _ATTRIBUTE, GivenPositions(ids))


def given_positions(args: tuple[Any, ...], kwargs: dict[str, Any], is_compiling: bool) -> GivenPositions | None:
    """The positions of this pass: those that the rotary embedding was given, else the layer's own argument."""
    for value in () if is_compiling else (*kwargs.values(), *args):
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        given: GivenPositions | None = getattr(first, _ATTRIBUTE, None)
        if given is not None:
            return given
    ids = kwargs.get("position_ids")
    return GivenPositions(ids, token=None) if isinstance(ids, torch.Tensor) and ids.dim() > 1 else None
