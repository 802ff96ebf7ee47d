"""Keys of a cache under a further rotation, kept on the cache so that each is turned once, and not in every pass."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .keys_left import version_of
from .positions import Positions
from .rotation import RotationTable, rotate

_ATTRIBUTE = "_moice_turned_keys"
_AHEAD = 64
"""So many keys more are turned than were asked for, so that single tokens seldom turn any."""


class TurnedKeys:
    """Leading keys of one layer of a cache, turned by their index.

    A later pass takes them up only where the layer's keys are the tensor that they were made of, or its beginning: at
    the same place in memory, which nobody else has while it is held here, and of the same version, which changes where
    a tensor is written. Keys that were exchanged, reordered, moved or copied are turned anew. Only for layers that
    grow by another tensor, and not in inference mode, which counts no versions.

    Memory: that of as many keys, and up to an eighth more.
    """

    def __init__(self) -> None:
        self._turned: torch.Tensor | None = None  # [B, G, capacity, D]
        self._count = 0  # how many are turned
        self._delta: torch.Tensor | None = None  # by what, in radians per position
        self._source: tuple[Any, tuple[Any, ...]] | None = None  # memory and mark of the keys that a pass left

    @classmethod
    def before_pass(cls, positions: Positions) -> "TurnedKeys | None":
        """Those of a layer, of which nothing is left that its keys do not warrant; to be called before these grow."""
        if positions.cache is None or getattr(positions.cache, "offloading", False):
            return None
        kept: TurnedKeys = vars(positions.cache).setdefault(_ATTRIBUTE, {}).setdefault(positions.layer_idx, cls())
        source, kept._source = kept._source, None
        keys = _keys_of(positions)
        if source is None or keys is None or _mark(keys) != source[1]:
            kept._turned, kept._count = None, 0
        else:
            kept._count = min(kept._count, keys.shape[2])
        return kept

    def are_of(self, positions: Positions, key: torch.Tensor) -> bool:
        """Whether `key` is what the layer has now: its keys before the pass, and new ones behind them."""
        return _keys_of(positions) is key and not key.is_inference()

    def upto(self, end: int, key: torch.Tensor, rotations: RotationTable, turn: int) -> torch.Tensor:
        """The first `end` of the layer's keys `[B, G, T, D]` under one rotation of the table. Without gradients."""
        delta = rotations.deltas[turn]
        if self._delta is None or not torch.equal(self._delta, delta):
            self._count, self._delta = 0, delta
        turned, start = self._turned, min(self._count, end)
        if start < end or turned is None:
            ahead = min(end + _AHEAD, key.shape[2])
            if turned is None or turned.shape[2] < ahead:
                grown = key.new_empty(*key.shape[:2], ahead + ahead // 8, key.shape[3])
                if turned is not None:
                    grown[:, :, :start] = turned[:, :, :start]
                self._turned = turned = grown
            cos, sin = (x[turn, start:ahead] for x in rotations.cos_sin(ahead, key.device))
            turned[:, :, start:ahead] = rotate(key[:, :, start:ahead].detach(), cos, sin, rotations.layout)
            self._count = ahead
        self._source = key.untyped_storage(), _mark(key)
        return turned[:, :, :end]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TurnedKeys":
        return TurnedKeys()

    def __reduce__(self) -> tuple[Any, ...]:
        return TurnedKeys, ()


def _keys_of(positions: Positions) -> torch.Tensor | None:
    layers = () if positions.cache is None else positions.cache.layers[positions.layer_idx :][:1]
    keys = [layer.keys for layer in layers if type(layer) is DynamicLayer and layer.get_seq_length() > 0]
    return keys[0] if keys else None


def _mark(keys: torch.Tensor) -> tuple[Any, ...]:
    """Equal for the same tensor, a crop of its end, and nothing else, as long as somebody holds the memory."""
    sizes = (*keys.shape[:2], keys.shape[3])
    return (keys.device, keys.data_ptr(), keys.dtype, keys.stride(), sizes, version_of(keys))
