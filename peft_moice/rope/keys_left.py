"""Whether the keys in a cache are still those that the last pass left there.

Anybody may write the tensors of a cache: libraries that evict keys take some of them out, attention sinks rotate the
rest anew. The number of keys does not tell that from a cache that was cropped at its end.
"""

import copy
import enum
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer


class Fate(enum.Enum):
    """What became of the keys: in their order still, in whatever rows; some at other places; or others altogether."""

    KEPT = enum.auto()
    MOVED = enum.auto()
    REWRITTEN = enum.auto()


@dataclass
class KeysLeft:
    """The keys of one layer as a pass left them. They are compared only where their tensor was exchanged since.

    Attributes:
        layer_idx: index of the layer.
        keys: `[B, G, T, D]`, the last T of the keys; in a static cache, all places.
        version: of `keys`.
        num_keys: number of keys in the cache.
    """

    layer_idx: int
    keys: torch.Tensor
    version: int | None
    num_keys: int

    @classmethod
    def of(cls, cache: Cache, layer_idx: int, num_keys: int) -> "KeysLeft | None":
        """Those of a layer of `cache` now; None where it does not show them."""
        keys = getattr(cache.layers[layer_idx], "keys", None) if layer_idx < len(cache.layers) else None
        if not isinstance(keys, torch.Tensor) or keys.dim() != 4:
            return None
        return cls(layer_idx, keys, version_of(keys), num_keys)

    def fate(self, cache: Cache, past: int) -> Fate:
        """What became of the keys in `cache`, which has `past` keys now. Waits for the device if they are copies."""
        left = KeysLeft.of(cache, self.layer_idx, past)
        if left is None or left.keys.shape[1::2] != self.keys.shape[1::2]:
            return Fate.REWRITTEN
        is_static = isinstance(cache.layers[self.layer_idx], StaticLayer)
        first_then, first_now = (0 if is_static else of.num_keys - of.keys.shape[-2] for of in (self, left))
        start = max(first_then, first_now)
        end = max(start, min(past, self.num_keys))
        then, now = self.keys[:, :, start - first_then : end - first_then], left.keys[:, :, start - first_now :]
        now = now[:, :, : end - start]
        if (now.data_ptr(), now.shape, now.stride()) == (then.data_ptr(), then.shape, then.stride()):
            # Compiled passes write a static cache in place, and add to it.
            return Fate.KEPT if left.version == self.version or past > self.num_keys else Fate.MOVED
        then, everywhere = (_codes(keys.to(now)) for keys in (then, self.keys))
        now = _codes(now)
        if end > start and bool(torch.isin(_sums(now.flatten(1)), _sums(then.flatten(1))).all()):
            return Fate.KEPT
        in_place = (now[:, None] == then[None]).any(dim=1)
        return Fate.MOVED if bool((torch.isin(now, everywhere) & ~in_place).any()) else Fate.REWRITTEN

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeysLeft":
        keys = copy.deepcopy(self.keys, memo)
        return KeysLeft(self.layer_idx, keys, version_of(keys), self.num_keys)


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes where a tensor is written in place; None where that is not known, as in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _codes(keys: torch.Tensor) -> torch.Tensor:
    """A number for each key `[B, G, T]`; equal keys have equal ones in every layout."""
    return _sums(keys.detach().float().contiguous().view(torch.int32).long())


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Sums `[...]` of integers `[..., n]`, modulo 2^64: they depend on the order of the integers, not of summation."""
    weights = torch.arange(1, 2 * values.shape[-1], 2, device=values.device) * 0x9E3779B97F4A7C1
    return (values * weights).sum(dim=-1)
