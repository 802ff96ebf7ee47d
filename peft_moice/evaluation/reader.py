"""Reads sequences one after the other, and of each only what the one before did not begin with."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Reader:
    """A model with a cache that goes back to where two sequences part.

    Models whose layers keep something else than keys and values (linear attention, ...), or prompts of virtual tokens,
    cannot go back, so they read every sequence whole.
    """

    def __init__(self, model: Any):
        self.model = model
        self._keyword = cache_keyword(model)
        kinds = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        # PEFT puts virtual tokens before whatever is read, also behind a cache.
        has_virtual_tokens = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        self._goes_back = all(isinstance(layer, DynamicLayer) for layer in kinds) and not has_virtual_tokens
        self._ids: list[int] = []
        self._cache: Any = None

    def logits(self, ids: list[int], first: int) -> torch.Tensor:
        """Logits `[len(ids) - first + 1, vocabulary]` in float32 after each token from index `first` - 1 on, where
        `first` is the index of the first token to predict, at least 1.
        """
        # The token that the first prediction follows is read anew.
        shared = common_length(self._ids, ids[: first - 1]) if self._goes_back else 0
        self._go_back(shared)
        inputs = torch.tensor([ids[shared:]], device=self.model.device)
        keywords = {self._keyword: self._cache} if self._goes_back else {}
        output = self.model(
            input_ids=inputs, use_cache=self._goes_back, logits_to_keep=len(ids) - first + 1, **keywords
        )
        self._ids = list(ids)
        logits: torch.Tensor = output.logits[0, first - len(ids) - 1 :]
        return logits.float()

    def write(
        self,
        ids: list[int],
        max_new_tokens: int,
        end: set[int],
        enough: Callable[[list[int]], bool] = lambda written: False,
    ) -> list[int]:
        """Tokens that greedy decoding writes after `ids`, up to one of `end` (left out), to `max_new_tokens`, or until
        what is written is `enough`.
        """
        written: list[int] = []
        while len(written) < max_new_tokens and not enough(written):
            sequence = [*ids, *written]
            token = int(self.logits(sequence, len(sequence))[-1].argmax())
            if token in end:
                break
            written.append(token)
        return written

    def _go_back(self, length: int) -> None:
        if length == 0 or self._cache is None:
            # Without a config every layer keeps all that it has seen, those with a sliding window included.
            self._cache = DynamicCache()
        elif length < len(self._ids):
            self._cache.crop(length - len(self._ids))


def cache_keyword(model: Any) -> str:
    """What a model calls the cache that is passed to it: `cache`, or `past_key_values` up to transformers 5.23."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def common_length(first: list[int], second: list[int]) -> int:
    """Number of tokens that two sequences have in common at their beginnings."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
