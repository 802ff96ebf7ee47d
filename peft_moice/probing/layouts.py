"""Which layout of rotated coordinates explains what an attention module did to its queries and keys."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..rope import RotaryLayout, rotate

_TOLERANCE = 32
"""Largest error of the layout that is taken, in units of the precision."""
_MARGIN = 10
"""How many times as far off the second best layout has to be."""


@dataclass
class Capture:
    """Queries and keys of one attention module under two base angles.

    Attributes:
        positions: of the S tokens.
        pairs: queries `[1, H, S, D]` under either angle, and keys `[1, G, S, D]` likewise.
    """

    positions: tuple[int, ...]
    pairs: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def head_dim(self) -> int:
        return self.pairs[0][0].shape[-1]


def best_layout(capture: Capture, deltas: torch.Tensor) -> tuple[RotaryLayout, int] | None:
    """The layout and direction in which rotations by `deltas` `[P]` per position lead from one angle to the other.

    None if no layout does within the tolerance, or if two do about as well.
    """
    errors = {
        candidate: error_of(capture, candidate[1] * deltas, candidate[0])
        for candidate in _candidates(size=2 * deltas.numel(), head_dim=capture.head_dim)
    }
    best, *others = sorted(errors, key=errors.__getitem__)
    if not explains(capture, errors[best]):
        return None
    second = min((errors[other] for other in others), default=float("inf"))
    return best if second > max(_MARGIN * errors[best], tolerance_of(capture)) else None


def explains(capture: Capture, error: float) -> bool:
    """Whether an `error` of [`error_of`] is no more than rounding."""
    return error <= tolerance_of(capture)


def tolerance_of(capture: Capture) -> float:
    """What rounding may cost: of values in their dtype, and of angles in float32."""
    precision = max(torch.finfo(own.dtype).eps for own, _ in capture.pairs)
    return _TOLERANCE * max(precision, torch.finfo(torch.float32).eps)


def error_of(capture: Capture, deltas: torch.Tensor, layout: RotaryLayout) -> float:
    """Largest difference between rotations by `deltas` `[P]` per position and what the module did.

    In units of the two coordinates that a rotation mixes, so that large ones elsewhere hide nothing.
    """
    angles = torch.tensor(capture.positions, dtype=torch.float64, device="cpu")[:, None] * deltas
    quarter = torch.zeros_like(angles, dtype=torch.float32), torch.ones_like(angles, dtype=torch.float32)

    def error(own: torch.Tensor, rotated: torch.Tensor) -> float:
        own, rotated = (x[..., : len(capture.positions), :].cpu().float() for x in (own, rotated))
        predicted = rotate(own, angles.cos().float(), angles.sin().float(), layout)
        scale = own.abs() + rotate(own, *quarter, layout).abs()
        relative = (predicted - rotated).abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)
        return relative.nan_to_num(nan=float("inf")).max().item()

    return max(error(own, rotated) for own, rotated in capture.pairs)


def _candidates(size: int, head_dim: int) -> Iterator[tuple[RotaryLayout, int]]:
    # A single pair is the same whether interleaved or not.
    orders = (False, True) if size > 2 else (False,)
    for direction in (1, -1):
        for start in dict.fromkeys((0, head_dim - size)):
            for interleaved in orders:
                if start >= 0:
                    yield RotaryLayout(start, size, interleaved), direction
