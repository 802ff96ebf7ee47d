"""Where the keys in a key-value cache stand. The note lies on the cache, so that copies of the cache know as much."""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache

from .given_positions import GivenPositions, PassMark, can_look
from .key_order import visible_keys
from .keys_left import Fate, KeysLeft

_ATTRIBUTE = "_moice_note"
_MIN_CAPACITY = 64


class NotedKeys:
    """Where the keys in a cache stand.

    Attributes:
        num_keys: number of keys, with those of the pass that was noted last.
        counted: how many leading keys are known to count up: every row is one sequence, so that the order of the keys
            says how far they are from one another. 0 if they are known not to, None if nobody has looked since keys
            came. Keys behind them are trusted to count on, on devices that nobody waits for.
        continues: whether the pass that was noted last goes on where such rows end, or is trusted to.
        is_guess: whether the keys before that pass may stand elsewhere than noted.
        longrope: what `longrope` noted, by original length.

    Rows of the batch may be repeated, as a whole or each in place, and permuted among rows with equal positions. Keys
    may be taken away at the end, and left out in front (sliding windows). Where others were taken out or moved, nobody
    knows where the rest stands.
    """

    def __init__(self) -> None:
        self.num_keys = 0
        self.counted: int | None = None
        self.continues = False
        self.is_guess = False
        self.longrope: dict[int, Any] = {}
        self._positions: torch.Tensor | None = None  # [rows, capacity]; not a number for keys that were moved
        self._num_blank = 0  # leading keys without an entry in the positions
        self._pass: PassMark | None = None  # the pass that was noted last
        self._left: KeysLeft | None = None

    @classmethod
    def on(cls, cache: Cache) -> "NotedKeys":
        """The note on `cache`, made if there is none."""
        note: NotedKeys | None = getattr(cache, _ATTRIBUTE, None)
        if note is None:
            note = cls()
            setattr(cache, _ATTRIBUTE, note)
        return note

    @staticmethod
    def of(cache: Cache) -> "NotedKeys | None":
        """The note on `cache`, or None."""
        return getattr(cache, _ATTRIBUTE, None)

    @classmethod
    def refuse_compiled(cls, cache: Cache) -> None:
        """Raise a ValueError if keys in `cache` do not count up: compiled code goes by the order of the keys."""
        note = cls.of(cache)
        if note is not None and note.num_keys and not note.counted:
            raise ValueError(
                "Compiled code counts positions by the order of the keys, but the rows in the cache are not known to "
                "count up by one to their last token. Pad prompts on the left, leave `position_ids` out, or run "
                "without compilation (`disable_compile=True` in `generate`)."
            )

    def begin(
        self,
        cache: Cache,
        layer_idx: int,
        shape: tuple[int, int],
        ids: torch.Tensor | None,
        given: GivenPositions | None,
    ) -> int:
        """Note a pass of S queries in B rows (`shape`) at `ids` `[B or 1, S]`, if these are known, before one of its
        layers runs; return the number of keys before it."""
        batch, num_queries = shape
        mark = None if ids is None or given is None else given.mark
        start, known = self.num_keys - num_queries, self._pass
        has_same_ids = mark is not None and known is not None and mark[0] is known[0] and mark[1] == known[1]
        has_same_token = mark is not None and known is not None and mark[2] is known[2] is not None
        length = cache.get_seq_length(layer_idx)
        # Some layers borrow the keys of others, or come more than once in a pass.
        if has_same_token or (has_same_ids and layer_idx >= len(cache.layers)):
            self._check_length(length, start, self.num_keys)
            return start
        if isinstance(length, torch.Tensor) and length.device.type != "cpu" and num_queries == 1 and self.num_keys:
            past = start if has_same_ids else self.num_keys
        else:
            past = int(length)
        end = past + num_queries
        if ids is None:
            if end != self.num_keys:
                self._forget(end)
        # A model with several rotary embeddings gives the same tensor to all of them.
        elif not (has_same_ids and end == self.num_keys):
            self._begin_at(past, batch, ids, cache)
            has_counted = self.counted
            self._write(ids, past)
            self._pass, self.num_keys = mark, end
            self.continues = bool(has_counted) and self._goes_on(ids)
            if not self.continues and (has_counted != 0 or can_look(ids)):
                self.counted = None
        return past

    def _goes_on(self, ids: torch.Tensor) -> bool:
        """Whether the last pass, at `ids`, goes on where rows end that counted up before; to be taken on trust where
        values may not be read, until the next pass in which they may."""
        assert self._positions is not None and self.counted
        if not can_look(ids):
            return True
        goes_on = bool((self._positions[:, self.counted - 1 : self.num_keys].diff(dim=-1) == 1).all())
        if goes_on:
            self.counted = self.num_keys
        return goes_on

    def judged(self, continues: bool) -> None:
        """Take up what looking at the pass that was noted last has shown, in one of its layers."""
        self.counted = self.num_keys if continues and self.counted != 0 else 0

    def leave(self, cache: Cache, layer_idx: int) -> None:
        """Remember the keys that the pass left in `cache`, after its first layer has run."""
        if self._left is None:
            self._left = KeysLeft.of(cache, layer_idx, self.num_keys)
            self._check_length(cache.get_seq_length(layer_idx), self.num_keys)

    def _check_length(self, length: int | torch.Tensor, *expected: int) -> None:
        """Keys were taken out if a layer has neither as many as `expected` nor none of its own."""
        if isinstance(length, int) and length not in (0, *expected):
            self._lose(self.num_keys)

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

    def _begin_at(self, past: int, batch: int, ids: torch.Tensor, cache: Cache) -> None:
        """Make the note one of `past` keys of `batch` rows, which tokens at `ids` are about to follow."""
        left, self._left = self._left, None
        if past == 0:
            self._positions, self.counted, self.is_guess, self._num_blank, self.num_keys = None, None, False, 0, 0
            return
        fate = Fate.KEPT if left is None else left.fate(cache, past)
        if fate is Fate.MOVED:
            return self._lose(past)
        if fate is Fate.REWRITTEN or (left is None and past < self.num_keys and not self._follow(ids, past)):
            return self._forget(past)
        if past > self.num_keys:
            # Keys came that nobody told about, in compiled passes for one, which count up.
            last = self._last(self.num_keys)
            if last is None or not self.counted:
                self._num_blank = past
            else:
                self._write(last + torch.arange(1, past - self.num_keys + 1, device=last.device), self.num_keys)
            self.is_guess, self.counted = True, None
        self.num_keys, self._num_blank = past, min(self._num_blank, past)
        self.counted = None if self.counted is None else min(self.counted, past)
        if self._positions is not None and self._positions.shape[0] not in (1, batch):
            self._change_rows(batch)
        if self._has_moved_rows(ids, past):
            self._forget(past)

    def _follow(self, ids: torch.Tensor, past: int) -> bool:
        """Whether tokens at `ids` go on where the first `past` keys end, as after a crop."""
        last = self._last(past)
        return last is not None and bool((ids[:, :1].to(last.device) == last + 1).all())

    def _change_rows(self, batch: int) -> None:
        assert self._positions is not None
        rows = self._positions.shape[0]
        noted = self._positions[:, : self.num_keys]
        if bool((noted == noted[:1]).all()):
            self._positions = self._positions[:1].clone()
        elif batch % rows == 0:
            self._positions = self._positions.repeat_interleave(batch // rows, dim=0)
        else:
            self._forget(self.num_keys)

    def _has_moved_rows(self, ids: torch.Tensor, past: int) -> bool:
        """Whether tokens at `ids` behind `past` keys go on where other rows end, as rows that were permuted do."""
        last = self._last(past)
        if last is None or not can_look(ids) or last.shape[0] == 1 or bool((last == last[0]).all()):
            return False
        first = ids[:, :1].to(last.device).expand(last.shape[0], -1)
        moved = first != last + 1
        return bool(moved.any()) and bool(((first - 1 == last.T) | ~moved).any(dim=-1).all())

    def _forget(self, num_keys: int) -> None:
        """Note that there are `num_keys` keys, and nobody told where they stand."""
        if self._positions is not None and bool(self._positions[:, :1].isnan().any()):
            return self._lose(num_keys)
        self.num_keys = self._num_blank = num_keys
        self._positions, self._pass, self.counted, self.continues, self.is_guess = None, None, None, False, True

    def _lose(self, num_keys: int) -> None:
        """Note that keys were taken out or moved, so that the order of the `num_keys` keys says nothing."""
        self._positions = torch.full((1, num_keys), torch.nan, dtype=torch.float64, device="cpu")
        self.num_keys, self._num_blank = num_keys, 0
        self.counted, self.continues, self.is_guess = 0, False, True

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "NotedKeys":
        copied = NotedKeys()
        copied.__dict__.update(self.__dict__)
        copied._pass = None
        copied._positions = None if self._positions is None else self._positions.clone()
        copied._left, copied.longrope = copy.deepcopy((self._left, self.longrope), memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None, "_left": None}
