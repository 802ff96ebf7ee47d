"""Rotations of queries and keys: where the rotated coordinates lie, and the tables of cosines and sines.

A key in the cache carries the model's own rotation. Rotations compose, so expert j needs only the further rotation by
the difference of the inverse frequencies, `R(θ_j) = R(θ_j - θ_0) R(θ_0)`, and only differences of positions matter.
"""

from dataclasses import dataclass
from typing import Any

import torch

_MIN_TABLE_LENGTH = 256


@dataclass(frozen=True)
class RotaryLayout:
    """Which dimensions of a query or key vector are rotated, and how they pair up.

    Attributes:
        start: first rotated dimension (0, or D - size for latent attention).
        size: number of rotated dimensions, twice the number P of angles.
        interleaved: pairs are (0, 1), (2, 3), ... if true, (0, P), (1, P + 1), ... if false.
    """

    start: int
    size: int
    interleaved: bool


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Rotate the coordinate pairs of `x` `[..., S, D]` by the angles behind `cos` and `sin` `[..., S, P]`.

    Leading dimensions are broadcast. Works in float32 and returns the dtype of `x`.
    """
    sizes = [layout.start, layout.size, x.shape[-1] - layout.start - layout.size]
    before, own, after = torch.split(x, sizes, dim=-1)
    own = own.to(torch.promote_types(x.dtype, torch.float32))
    if layout.interleaved:
        first, second = own[..., 0::2], own[..., 1::2]
    else:
        first, second = own.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if layout.interleaved else torch.cat(pair, dim=-1)
    rotated = rotated.to(x.dtype)
    if layout.size == x.shape[-1]:
        return rotated
    leading = rotated.shape[:-1]
    return torch.cat((before.expand(*leading, -1), rotated, after.expand(*leading, -1)), dim=-1)


NEVER = 2**40
"""A distance that no key has."""


@dataclass(frozen=True, eq=False)
class FarRopes:
    """Under which angles experts rotate what is far from the query.

    An expert's angle between a query and a key at the distance d is `θ_j d` below `start`, and goes on from there as
    `θ_j start + φ_j (d - start)`: keys turned by `(φ_j - θ_0) n`, queries by `(φ_j - θ_0) (m - start)`, where keys
    carry the model's own θ_0, and `θ_j` is `θ_0`.

    Attributes:
        deltas: `[N, P]` float64, inverse frequencies φ_j minus the model's own; any for experts without far keys.
        starts: for each expert the distance from which keys are far, or [`NEVER`].
        factors: by what each expert multiplies the rotated part of scores, `[2 N]`: of near keys, then of far ones.
    """

    deltas: torch.Tensor
    starts: tuple[int, ...]
    factors: tuple[float, ...]


class RotationTable:
    """Cosines and sines of the further rotations of N experts, shared by all layers with the same angles.

    Args:
        deltas: `[N, P]` float64, inverse frequencies of each expert minus the model's own, in radians per position.
        layout: where the rotated coordinates lie.
        far: how far keys are rotated. Default: None, as near ones.

    Tables grow with the longest sequence seen and take N · T · P · 8 bytes per device, with `far` twice as much. They
    are left out of copies and pickles.
    """

    def __init__(self, deltas: torch.Tensor, layout: RotaryLayout, far: FarRopes | None = None):
        self.near_deltas = deltas
        self.deltas = deltas if far is None else torch.cat((deltas, far.deltas))
        self.layout = layout
        self.far = far
        self.is_identity = (deltas == 0).all(dim=-1).tolist()
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RotationTable":
        return self

    @property
    def num_experts(self) -> int:
        return self.near_deltas.shape[0]

    def cos_sin(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at positions 0 to `length` - 1, each `[N, length, P]` in float32 on `device`.

        With `far`, `[2 N, length, P]`: those for far keys come behind the others.
        """
        cos, sin = self.at_least(length, device)
        return cos[:, :length], sin[:, :length]

    def at_least(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`cos_sin`] gives, perhaps for further positions."""
        if torch.compiler.is_compiling():
            # A compiled graph must not grow a table that outlives it.
            positions = torch.arange(length, dtype=torch.float64, device=device)
            return _cos_sin(positions, self.deltas.to(device))
        table = self._tables.get(device)
        if table is None or table[0].shape[1] < length:
            padded = max(_MIN_TABLE_LENGTH, 1 << (length - 1).bit_length())
            # The table outlives this pass, so a pass in inference mode must not make it unfit for training.
            with torch.inference_mode(False):
                positions = torch.arange(padded, dtype=torch.float64, device=self.deltas.device)
                # One expert at a time: in float64, all of them would take several times the table's memory.
                parts = [_cos_sin(positions, delta[None]) for delta in self.deltas]
                cos, sin = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
                table = self._tables[device] = (cos, sin)
        return table

    def cos_sin_at(self, positions: torch.Tensor, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of one rotation of the table at `positions` `[..., S]`, each `[..., S, P]` in float32."""
        angles = positions.double()[..., None] * self.deltas[turn].to(positions.device)
        return angles.cos().float(), angles.sin().float()


class SwitchedTable(RotationTable):
    """Two tables, and on the device which of them holds.

    Args:
        short: taken where `is_long` is false.
        long: taken where `is_long` is true.
        is_long: scalar of booleans.
    """

    def __init__(self, short: RotationTable, long: RotationTable, is_long: torch.Tensor):
        # Not by the base class, which reads values, as compiled code could not.
        self.layout = short.layout
        self.deltas = self.near_deltas = short.deltas
        self.far = None
        self.is_identity = short.is_identity
        self.short = short
        self.long = long
        self.is_long = is_long

    def at_least(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # Cut first: the two tables may have grown differently.
        return self._switch(*(table.cos_sin(length, device) for table in (self.long, self.short)))

    def cos_sin_at(self, positions: torch.Tensor, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._switch(*(table.cos_sin_at(positions, turn) for table in (self.long, self.short)))

    def _switch(self, *tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (
            torch.where(self.is_long.to(long.device), long, short) for long, short in zip(*tables, strict=True)
        )
        return cos, sin


def _cos_sin(positions: torch.Tensor, deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[None, :, None] * deltas[:, None, :]
    return angles.cos().float(), angles.sin().float()
