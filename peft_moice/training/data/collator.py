"""Batches of examples."""

from collections.abc import Sequence
from typing import Any

import torch

from .examples import Example


class Collator:
    """Pads on the right; packed examples become one row of sequences that do not see each other.

    transformers tells packed sequences apart by positions that start again at 0, where there is no attention mask.

    Args:
        tokenizer: whose padding token fills rows up, 0 if it has none.
    """

    def __init__(self, tokenizer: Any):
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` `[B, S]`, with an `attention_mask`, or `position_ids` where rows are packed."""
        if any(len(example) > 1 for example in examples):
            row = [sequence for example in examples for sequence in example]
            return {
                "input_ids": torch.tensor([[token for sequence in row for token in sequence["input_ids"]]]),
                # Nothing predicts the first token of a sequence.
                "labels": torch.tensor([[label for sequence in row for label in [-100, *sequence["labels"][1:]]]]),
                "position_ids": torch.tensor([[i for sequence in row for i in range(len(sequence["input_ids"]))]]),
            }
        lengths = [len(sequence["input_ids"]) for (sequence,) in examples]

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([seq[name] + [filler] * (max(lengths) - len(seq[name])) for (seq,) in examples])

        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", -100),
            "attention_mask": mask.long(),
        }
