"""What the library notes on a cache. It lies on the cache, so that copies of the cache know as much."""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache

from .order import visible_keys
from .told import ToldPositions, can_look

_ATTRIBUTE = "_moice_note"
_MIN_CAPACITY = 64


class CacheNote:
    """Where the keys in a cache stand.

    Attributes:
        num_keys: number of keys, with those of the pass that was noted last.
        in_order: whether every row is one sequence that counts up, so that the order of the keys says how far they
            are from one another; None if nobody has looked since keys came.
        continues: whether the pass that was noted last goes on where such rows end, or is trusted to.
        longrope: what `longrope` noted, by original length.

    Rows of the batch may be repeated, as a whole or each in place, and permuted among rows with equal positions. Keys
    may be taken away at the end, and left out in front (sliding windows).
    """

    def __init__(self) -> None:
        self.num_keys = 0
        self.in_order: bool | None = True
        self.continues = False
        self.longrope: dict[int, Any] = {}
        self._positions: torch.Tensor | None = None  # [rows, capacity]
        self._num_looked_at = 0  # leading keys whose positions are known to count up, where `in_order` holds
        self._num_untold = 0  # leading keys that nobody told about
        self._num_blank = 0  # leading keys without an entry in the positions
        self._token: object = None
        self._ids: torch.Tensor | None = None
        self._version: int | None = None
        self._first_of_pass = True
        self._past = 0

    @classmethod
    def on(cls, cache: Cache) -> "CacheNote":
        """The note on `cache`, made if there is none."""
        note = cls.of(cache)
        if note is None:
            note = cls()
            setattr(cache, _ATTRIBUTE, note)
        return note

    @staticmethod
    def of(cache: Cache) -> "CacheNote | None":
        """The note on `cache`, or None."""
        return getattr(cache, _ATTRIBUTE, None)

    @classmethod
    def refuse_compiled(cls, cache: Cache) -> None:
        """Raise a ValueError if keys in `cache` do not count up: compiled code goes by the order of the keys."""
        note = cls.of(cache)
        if note is not None and note.in_order is not True:
            raise ValueError(
                "Compiled code counts positions by the order of the keys, but the rows in the cache are not known to "
                "count up by one to their last token. Pad prompts on the left, leave `position_ids` out, or run "
                "without compilation (`disable_compile=True` in `generate`)."
            )

    def num_past(self, cache: Cache, layer_idx: int, num_queries: int, told: ToldPositions | None) -> int:
        """Number of keys in `cache` before this pass."""
        if told is not None and (
            self._is_noted(told) or (layer_idx >= len(cache.layers) and self._has_same_ids(told))
        ):
            # Some layers borrow the keys of others, or come more than once in a pass.
            return self._past
        past = cache.get_seq_length(layer_idx)
        if isinstance(past, torch.Tensor) and past.device.type != "cpu" and num_queries == 1 and self.num_keys:
            return self._past if told is not None and self._has_same_ids(told) else self.num_keys
        return int(past)

    def add(self, ids: torch.Tensor, past: int, batch: int, told: ToldPositions) -> None:
        """Note that tokens at positions `ids` `[B or 1, S]` follow the first `past` keys.

        Args:
            ids: positions.
            past: number of keys before.
            batch: B.
            told: how the layer learned them.
        """
        end = past + ids.shape[-1]
        # A model with several rotary embeddings gives the same tensor to all of them.
        if self._is_noted(told) or (self._has_same_ids(told) and end == self.num_keys):
            return
        self._begin_at(past, batch)
        if self._has_moved_rows(ids, past):
            self._forget_rows()
        in_order = self.in_order
        self._write(ids, past)
        self._token, self._past, self.num_keys, self._first_of_pass = told.token, past, end, True
        self._ids, self._version = told.ids, _version(told.ids)
        self.continues = in_order is True and past > 0 and self._goes_on(ids)
        if not self.continues and in_order is not False:
            self.in_order = None

    def _goes_on(self, ids: torch.Tensor) -> bool:
        """Whether the last pass, at `ids`, goes on where rows end that counted up before; to be taken on trust where
        values may not be read, until the next pass in which they may."""
        if self._positions is None or self._num_looked_at == 0:
            return False
        if not can_look(ids):
            return True
        since = self._positions[:, self._num_looked_at - 1 : self.num_keys]
        goes_on = bool((since.diff(dim=-1) == 1).all())
        if goes_on:
            self._num_looked_at = self.num_keys
        return goes_on

    def judged(self, continues: bool | None) -> None:
        """Take up what looking at the pass that was noted last has shown, in one of its layers."""
        if self._first_of_pass or (self.in_order is not False and continues is not True):
            self.in_order = continues
        self._first_of_pass = False
        self._num_looked_at = self.num_keys

    def lose_track(self, num_keys: int) -> None:
        """Note that there are `num_keys` keys now, and that some of them stand nobody knows where."""
        if num_keys != self.num_keys:
            self.num_keys = self._num_untold = self._num_blank = num_keys
            self.in_order, self.continues, self._token, self._ids = None, False, None, None

    def positions_of_keys(self, offset: int, num_keys: int, mask: Any) -> torch.Tensor:
        """Positions `[rows, T]` of the keys from `offset` on. Unused places behind them count up.

        Keys that nobody told about are numbered from 0, without those that `mask` hides, as `generate` does.
        """
        assert self._positions is not None
        end = offset + num_keys
        positions = self._positions[:, offset : min(end, self.num_keys)]
        if end > self.num_keys:
            unused = torch.arange(1, end - self.num_keys + 1, device=positions.device)
            positions = torch.cat((positions, positions[:, -1:] + unused), dim=-1)
        blank = self._num_blank - offset
        if blank > 0:
            counted = torch.arange(offset, self._num_blank, device=positions.device)[None]
            if offset > 0:
                # No mask goes back to the beginning, so these are taken to lead up to those that were told.
                counted = positions[:, blank : blank + 1] + counted - self._num_blank
            elif isinstance(mask, torch.Tensor) and mask.shape[-1] == num_keys:
                real = mask.bool() if mask.dim() == 2 else visible_keys(mask).any(dim=-2)
                counted = real[:, :blank].to(positions.device).long().cumsum(dim=-1) - 1
            rows = max(counted.shape[0], positions.shape[0])
            told = positions[:, blank:].expand(rows, -1)
            positions = torch.cat((counted.expand(rows, -1).to(told.dtype), told), dim=-1)
        return positions

    @property
    def is_guess(self) -> bool:
        """Whether the keys before the pass that was noted last may stand elsewhere than noted."""
        return self._num_untold > 0

    def _is_noted(self, told: ToldPositions) -> bool:
        return told.token is not None and self._token is told.token

    def _has_same_ids(self, told: ToldPositions) -> bool:
        return self._ids is told.ids and self._version == _version(told.ids)

    def _begin_at(self, past: int, batch: int) -> None:
        """Make the note one of `past` keys of `batch` rows."""
        if past == 0:
            self._positions, self.in_order = None, True
        elif past > self.num_keys:
            # Keys came that nobody told about, in compiled passes for one, which count up.
            last = self._last(self.num_keys)
            if last is None or self.in_order is not True:
                self._num_blank = past
            else:
                self._write(last + torch.arange(1, past - self.num_keys + 1, device=last.device), self.num_keys)
            self._num_untold, self._num_looked_at, self.in_order = past, past, None
        self._num_untold, self._num_blank = min(self._num_untold, past), min(self._num_blank, past)
        self._num_looked_at = min(self._num_looked_at, past)
        self.num_keys = past
        if self._positions is not None and self._positions.shape[0] not in (1, batch):
            self._change_rows(batch)

    def _change_rows(self, batch: int) -> None:
        assert self._positions is not None
        rows = self._positions.shape[0]
        noted = self._positions[:, : self.num_keys]
        if bool((noted == noted[:1]).all()):
            self._positions = self._positions[:1].clone()
        elif batch % rows == 0:
            self._positions = self._positions.repeat_interleave(batch // rows, dim=0)
        else:
            self._forget_rows()

    def _has_moved_rows(self, ids: torch.Tensor, past: int) -> bool:
        """Whether tokens at `ids` behind `past` keys go on where other rows end, as rows that were permuted do."""
        last = self._last(past)
        if last is None or not can_look(ids) or last.shape[0] == 1 or bool((last == last[0]).all()):
            return False
        first = ids[:, :1].to(last.device).expand(last.shape[0], -1)
        moved = first != last + 1
        return bool(moved.any()) and bool(((first - 1 == last.T) | ~moved).any(dim=-1).all())

    def _forget_rows(self) -> None:
        """Note that rows were selected or permuted, and nobody told which."""
        self._positions = None
        self._num_untold = self._num_blank = self.num_keys
        self.in_order = None

    def _last(self, past: int) -> torch.Tensor | None:
        """Positions `[rows, 1]` of the last of `past` keys."""
        return None if self._positions is None or past == 0 else self._positions[:, past - 1 : past]

    def _write(self, ids: torch.Tensor, past: int) -> None:
        end = past + ids.shape[-1]
        dtype = torch.float64 if ids.is_floating_point() else torch.int64
        # The note outlives this pass, so a pass in inference mode must not make it unfit for others.
        with torch.inference_mode(False), torch.no_grad():
            old = self._positions
            if old is None:
                old = torch.zeros(ids.shape[0], 0, dtype=dtype, device=ids.device)
            rows = max(old.shape[0], ids.shape[0])
            dtype = torch.promote_types(old.dtype, dtype)
            if old.shape[0] != rows or old.shape[1] < end or old.dtype != dtype:
                capacity = max(_MIN_CAPACITY, 1 << (end - 1).bit_length())
                grown = torch.zeros(rows, capacity, dtype=dtype, device=old.device)
                kept = min(past, old.shape[1])
                grown[:, :kept] = old[:, :kept]
                old = grown
            old[:, past:end] = ids.to(old.device)
            self._positions = old

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheNote":
        copied = CacheNote()
        copied.__dict__.update(self.__dict__)
        copied._token = copied._ids = None
        copied._positions = None if self._positions is None else self._positions.clone()
        copied.longrope = copy.deepcopy(self.longrope, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token": None, "_ids": None}


def _version(ids: torch.Tensor) -> int | None:
    """Changes where a tensor is written in place, as by loops that keep one buffer for positions."""
    return None if ids.is_inference() else ids._version
