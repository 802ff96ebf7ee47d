"""A call of the operator in the form in which kernels take it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...rope import RotationTable
from .tiles import ADDITIVE_MASK, BOOLEAN_MASK, INTERPRETED, LOG2E, NO_MASK, Form

MIN_BLOCK = 16
"""Smallest side of a product on tensor cores."""


def padded(size: int) -> int:
    """The block that `size` elements are padded to."""
    return max(MIN_BLOCK, int(triton.next_power_of_2(size)))


_LARGE = (9, 10)
"""Major compute capabilities with 227 KB of shared memory per program; consumers' cards have 99 KB."""


@dataclass
class Problem:
    """The tensors of a call, and what all kernels are told about them."""

    query: torch.Tensor  # [B, H, S, D]
    key: torch.Tensor  # [B, G, T, D]
    value: torch.Tensor  # [B, G, T, Dv]
    gates: torch.Tensor  # [B, H, S, N] float32, contiguous
    mask: torch.Tensor | None  # broadcasts to [B, H, S, T]
    rotations: RotationTable
    query_start: int | torch.Tensor  # a scalar
    scaling: float

    def __post_init__(self):
        self.query, self.key, self.value = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (self.query, self.key, self.value)
        )
        self.cos, self.sin = self.rotations.cos_sin(self.key.shape[-2], self.key.device)
        self.num_experts = self.gates.shape[-1]
        self.groups = self.query.shape[1] // self.key.shape[1]
        self.num_rows = self.query.shape[2] * self.groups
        self.lists = self.key.shape[0] * self.key.shape[1]

    def arguments(self, rows: int, keys: int) -> dict[str, Any]:
        """Keyword arguments that all kernels take, for tiles of so many rows and keys."""
        query, key, value, layout = self.query, self.key, self.value, self.rotations.layout
        mask, kind = query, NO_MASK
        mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.mask is not None:
            mask = self.mask.expand(*query.shape[:3], key.shape[2])
            kind, mask_strides = ADDITIVE_MASK, mask.stride()
            if mask.dtype == torch.bool:
                mask, kind = mask.view(torch.uint8), BOOLEAN_MASK
        rest = query.shape[-1] - layout.size
        start = self.query_start
        return {
            "inputs": (query, key, value, mask, self.gates),
            "strides": (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides),
            "sizes": (self.num_experts, key.shape[1], self.scaling * LOG2E.value),
            "query_start": start if isinstance(start, int) else start.to(query.device),
            "S": query.shape[2],
            "T": key.shape[2],
            "form": Form(
                R=self.groups,
                D=query.shape[-1],
                DV=value.shape[-1],
                START=layout.start,
                P=layout.size // 2,
                INTERLEAVED=layout.interleaved,
                ROTATE=True,
                MASK=kind,
                START_IS_TENSOR=not isinstance(start, int),
                BM=rows,
                BN=keys,
                BP=padded(layout.size // 2),
                BR=padded(rest) if rest else 0,
                BV=padded(value.shape[-1]),
            ),
        }

    def by_expert(self, blocks: "Blocks") -> Iterator[dict[str, Any]]:
        """Keyword arguments and launch options of a kernel that runs once per expert, for each of them."""
        shared = self.arguments(blocks.rows, blocks.keys)
        for expert, is_identity in enumerate(self.rotations.is_identity):
            yield {
                **shared,
                "form": shared["form"]._replace(ROTATE=not is_identity),
                "expert": expert,
                "table": (self.cos[expert], self.sin[expert]),
                "num_warps": blocks.warps,
                "num_stages": 2,
            }


@dataclass
class Blocks:
    """Rows and keys per tile, and warps per program."""

    rows: int
    keys: int
    warps: int


def choose_blocks(problem: Problem, hopper: Blocks, ampere: Blocks) -> Blocks:
    """Block sizes: those given suit half precision and heads of up to 128 dimensions.

    Chosen so that the compiler spills next to no registers, and that tiles fit the shared memory of smaller cards.
    """
    wide = max(problem.query.shape[-1], problem.value.shape[-1]) > 128
    full = problem.query.dtype == torch.float32
    if INTERPRETED or (wide and full):
        return Blocks(MIN_BLOCK, MIN_BLOCK, 4)
    large = capability(problem.query.device) in _LARGE
    if wide or full:
        return Blocks(32, 32 if large or full else 16, 8)
    return hopper if large else ampere


def capability(device: torch.device) -> int:
    """Major compute capability."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
