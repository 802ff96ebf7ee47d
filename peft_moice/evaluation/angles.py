"""Which base angles for a model? A search that looks at RoPE alone, and one that asks the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..rope import LayerRope
from ..tuner.config import MoICEConfig

GRID = tuple(1 + step / 20 for step in range(41))
"""Candidates as multiples of the model's own angle, from one to three; the range of the published choices."""


def attention_waveform(head_dim: int, rope_theta: float, context_length: int) -> torch.Tensor:
    """How strongly RoPE lets attention reach back, `[context_length]` in float64, 0 to 1 by distance.

    The upper bound on attention scores from the RoPE paper (Su et al., 2021, section 3.4.3): the mean over the partial
    sums of `exp(i·x·θ_j)` of their magnitude, divided by its value at distance x = 0.

    Args:
        head_dim: number D of rotated dimensions, even.
        rope_theta: base angle, positive.
        context_length: number of distances, at least 3.

    Raises:
        ValueError: a value out of its range.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"`head_dim` is {head_dim}, but has to be even and at least 2.")
    if not 0 < rope_theta < math.inf or context_length < 3:
        raise ValueError(
            f"`rope_theta` {rope_theta} has to be positive and finite, `context_length` {context_length} at least 3."
        )
    frequencies = rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angles = torch.arange(context_length, dtype=torch.float64, device="cpu")[:, None] * frequencies
    partial_sums = torch.polar(torch.ones_like(angles), angles).cumsum(dim=-1)
    waveform = partial_sums.abs().mean(dim=-1)
    return waveform / waveform[0]


def extrema(waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances at which a waveform `[T]` has its peaks, and at which its troughs, ascending, without both ends."""
    rising = waveform[1:-1] > waveform[:-2]
    falling = waveform[1:-1] > waveform[2:]
    peaks = (rising & falling).nonzero().squeeze(-1) + 1
    troughs = (~rising & ~falling).nonzero().squeeze(-1) + 1
    return peaks, troughs


def search_angles(
    head_dim: int,
    rope_theta: float,
    context_length: int,
    num_experts: int = 7,
    candidates: Sequence[float] | None = None,
) -> list[float]:
    """Base angles whose attention waveforms interlock, chosen one after the other.

    The idea of Attention Buckets (Chen et al., 2023, arXiv 2312.04455): what stands where one angle's waveform has a
    trough is seen by another angle, which has a peak there. Starting with the model's own angle, each step adds the
    candidate whose peaks lie nearest to the troughs, and whose troughs lie nearest to the peaks, of those chosen so
    far (mean distance in tokens).

    For D = 128, `rope_theta` = 10000 and N = 7 it finds five of the official release's seven angles at a context of
    2,048 tokens and four at 4,096.

    Args:
        head_dim: number D of rotated dimensions.
        rope_theta: the model's own base angle.
        context_length: distances that matter, in tokens.
        num_experts: number N of angles, the model's own included. Default: 7.
        candidates: absolute base angles to choose from. Default: [`GRID`] times the model's own.

    Returns:
        N base angles, the model's own first.

    Raises:
        ValueError: fewer candidates than angles to choose, or a value out of its range.
    """
    own = float(rope_theta)
    peaks, troughs = extrema(attention_waveform(head_dim, own, context_length))
    if candidates is None:
        candidates = [round(multiple * own, 3) for multiple in GRID]
    pool = [float(base) for base in candidates]
    pool = [base for base in dict.fromkeys(pool) if base != own]
    if not 1 <= num_experts <= len(pool) + 1:
        raise ValueError(
            f"`num_experts` is {num_experts}, but has to lie in 1..{len(pool) + 1}. Give more candidates."
        )
    candidate_extrema = {base: extrema(attention_waveform(head_dim, base, context_length)) for base in pool}
    chosen = [own]
    while len(chosen) < num_experts:
        distances = {
            base: _mean_distance(troughs, candidate_extrema[base][0])
            + _mean_distance(peaks, candidate_extrema[base][1])
            for base in pool
            if base not in chosen
        }
        best = min(distances, key=lambda base: distances[base])
        chosen.append(best)
        peaks = torch.unique(torch.cat((peaks, candidate_extrema[best][0])))
        troughs = torch.unique(torch.cat((troughs, candidate_extrema[best][1])))
    return chosen


def _mean_distance(points: torch.Tensor, others: torch.Tensor) -> float:
    """Mean distance of each of `points` to the nearest of `others`, both sorted."""
    if not len(points) or not len(others):
        return math.inf
    right = torch.searchsorted(others, points).clamp(max=len(others) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.minimum((others[right] - points).abs(), (others[left] - points).abs())
    return nearest.double().mean().item()


@dataclass(frozen=True)
class OwnAngle:
    """A base angle of a model, and how much of a head it rotates.

    Attributes:
        rope_theta: the base angle.
        rotary_dim: number of rotated dimensions of a query or key vector.
        layer_type: the layers that have it, where the model has angles per layer type, else None.
    """

    rope_theta: float
    rotary_dim: int
    layer_type: str | None


def own_angles(model: nn.Module) -> list[OwnAngle]:
    """The base angles of a model's attention layers, as probed on the layers themselves.

    Args:
        model: the base model, without adapters. Unchanged afterwards.

    Returns:
        One for each layer type that has rotary embeddings, or a single one, in the order of layers.

    Raises:
        ValueError: the model has no attention layer that MoICE can be applied to, with the reason.
    """
    probe = get_peft_model(model, MoICEConfig(base_multipliers=[1.0]))
    try:
        layers: list[Any] = [layer for layer in probe.modules() if isinstance(layer, BaseTunerLayer)]
    finally:
        probe.unload()
    ropes: list[LayerRope] = [layer.rope for layer in layers]
    angles = [OwnAngle(rope.rope_theta, rope.layout.size, rope.layer_type) for rope in ropes]
    return list(dict.fromkeys(angles))


@dataclass(frozen=True)
class AngleScores:
    """What each candidate angle does on its own.

    Attributes:
        rope_bases: the C candidates, the model's own first.
        losses: `[C, P]`, loss of every candidate on each of P prompts.
    """

    rope_bases: tuple[float, ...]
    losses: torch.Tensor

    def best(self, num_experts: int) -> list[float]:
        """`num_experts` angles that complement each other: each step adds the one that lowers the mean over prompts of
        the least loss that any chosen angle has, starting with the model's own.

        Raises:
            ValueError: more angles than candidates, or none.
        """
        if not 1 <= num_experts <= len(self.rope_bases):
            raise ValueError(
                f"`num_experts` is {num_experts}, but has to lie in 1..{len(self.rope_bases)}. Score more candidates."
            )
        chosen = [0]
        least = self.losses[0]
        while len(chosen) < num_experts:
            rest = [index for index in range(len(self.rope_bases)) if index not in chosen]
            index = min(rest, key=lambda index: torch.minimum(least, self.losses[index]).mean().item())
            chosen.append(index)
            least = torch.minimum(least, self.losses[index])
        return [self.rope_bases[index] for index in chosen]


def score_angles(
    model: nn.Module,
    losses_of: Callable[[nn.Module], Sequence[float]],
    multipliers: Sequence[float] = (0.25, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0),
) -> AngleScores:
    """Run a model under one base angle after the other and record its losses on prompts of the user's own.

    Args:
        model: the base model, without adapters. Unchanged afterwards.
        losses_of: computes the loss of a model on each of P prompts.
        multipliers: candidate angles as multiples of the model's own, which is always among them. Default: a quarter
            to four times.

    Raises:
        ValueError: a multiple that is not positive, or the model's layers have angles of different kinds.
    """
    own = [angle.rope_theta for angle in own_angles(model)]
    if len(own) > 1:
        raise ValueError(
            f"The model's layer types have different angles, {own}; one is scaled. Give `base_multipliers` by hand."
        )
    multipliers = tuple(dict.fromkeys((1.0, *multipliers)))
    losses = []
    for multiple in tqdm(multipliers, desc="angles", unit="angle"):
        adapted = get_peft_model(model, MoICEConfig(rope_bases=[multiple * own[0]]))
        try:
            with torch.no_grad():
                losses.append([float(loss) for loss in losses_of(adapted)])
        finally:
            adapted.unload()
    scores = torch.tensor(losses, dtype=torch.float64, device="cpu")
    return AngleScores(tuple(multiple * own[0] for multiple in multipliers), scores)
