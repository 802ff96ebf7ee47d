"""A layer's rotary position embedding, and those that it would have under other base angles."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from .frequencies import inverse_frequencies, rope_parameters
from .own_rotary import OwnRotary
from .rotation import RotaryLayout, RotationTable, SwitchedTable

_MAX_UNUSED = 4
"""Tables kept for sets of base angles that no adapter has on its own."""


@dataclass
class LayerRope:
    """The rotary embedding of a layer, and those it would have under other base angles.

    Attributes:
        rotary: class of the model's rotary embedding module.
        config: the config that the rotary module was built from.
        layer_type: key into `config.rope_parameters` where the model has angles per layer type, else None.
        layout: where the rotated coordinates lie.
        direction: 1 if queries rotate with their position as in the paper's equation, -1 if against it.
        original_length: with rope type longrope, the number of tokens up to which the short factors hold, else None.
        is_long: whether the long factors hold, a bool or a scalar tensor; see [`longrope.rope_of_pass`].
        own: the model's rotary embedding, watched for changes, or None.

    Tables of rotations are kept for the sets of base angles that an adapter of some layer has (see [`prepare`]), and
    for the last few others that passes asked for, as combinations of adapters do.
    """

    rotary: type[nn.Module]
    config: object
    layer_type: str | None
    layout: RotaryLayout
    direction: int = 1
    original_length: int | None = None
    is_long: bool | torch.Tensor = False
    own: OwnRotary | None = field(default=None, repr=False)
    _tables: dict[tuple[tuple[float, ...], bool], RotationTable] = field(default_factory=dict, repr=False)
    _num_users: Counter[tuple[float, ...]] = field(default_factory=Counter, repr=False)

    @property
    def rope_theta(self) -> float:
        """The model's own base angle in this layer."""
        return float(rope_parameters(self.config, self.layer_type)["rope_theta"])

    def table(self, rope_bases: tuple[float, ...]) -> RotationTable:
        """The rotations that bring the model's own angle into each of `rope_bases`.

        Raises:
            ValueError: the model's rotary embedding is no longer the one that they start from.
        """
        if self.own is not None:
            self.own.check(self.layer_type)
        if isinstance(self.is_long, torch.Tensor):
            return SwitchedTable(self._table(rope_bases, False), self._table(rope_bases, True), self.is_long)
        return self._table(rope_bases, self.is_long)

    def check_config(self) -> None:
        """Raise a ValueError if the config no longer gives the frequencies that the layer rotates by."""
        if self.own is not None and self.own.holder is not None:
            reread = OwnRotary(self.own.holder, self.own.attribute).disagreement(self.layer_type)
            if reread is not None:
                raise ValueError(
                    f"The config of the model's rotary embedding was changed after an adapter was added: {reread}. "
                    "Put its rope parameters back as they were, and add the adapter again."
                )

    def prepare(self, rope_bases: tuple[float, ...]) -> None:
        """Keep the tables for `rope_bases` until [`release`], and build them now: compiled passes could not."""
        self._num_users[rope_bases] += 1
        self._table(rope_bases, False)
        if self.original_length is not None:
            self._table(rope_bases, True)

    def release(self, rope_bases: tuple[float, ...]) -> None:
        """Undo one [`prepare`]. Tables that nobody else keeps are freed, with those of past combinations."""
        self._num_users[rope_bases] -= 1
        if self._num_users[rope_bases] <= 0:
            del self._num_users[rope_bases]
            for key in self._unused():
                del self._tables[key]

    def with_factors(self, is_long: bool | torch.Tensor) -> "LayerRope":
        """The same rotary embedding under its long factors, or under its short ones. Tables are shared."""
        return LayerRope(
            self.rotary,
            self.config,
            self.layer_type,
            self.layout,
            self.direction,
            self.original_length,
            is_long,
            self.own,
            self._tables,
            self._num_users,
        )

    def _table(self, rope_bases: tuple[float, ...], is_long: bool) -> RotationTable:
        key = (rope_bases, is_long)
        if key not in self._tables:
            own, *others = (
                inverse_frequencies(self.rotary, self.config, self.layer_type, base, is_long)[0]
                for base in (self.rope_theta, *rope_bases)
            )
            deltas = torch.stack([other - own for other in others])
            for oldest in self._unused()[: -_MAX_UNUSED + 1]:
                del self._tables[oldest]
            self._tables[key] = RotationTable(self.direction * deltas, self.layout)
        return self._tables[key]

    def _unused(self) -> list[tuple[tuple[float, ...], bool]]:
        """Keys of the tables that no adapter keeps, the oldest first."""
        return [key for key in self._tables if key[0] not in self._num_users]
