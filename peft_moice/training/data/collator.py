"""Batches of examples, by the collators of transformers."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from .examples import Example


def make_collator(tokenizer: Any, packing: bool = False) -> Callable[[Sequence[Example]], Any]:
    """What makes a batch of what [`load_examples`] gives.

    Args:
        tokenizer: its padding token fills rows up on the right, or any other where it has none; it bears no loss.
        packing: one row of all sequences, which do not see each other, since positions start again at 0 with each.
            Default: False, a row for each sequence.
    """
    if packing:
        return partial(_collate, DataCollatorWithFlattening())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return partial(_collate, DataCollatorForSeq2Seq(tokenizer))


def _collate(collator: Callable[[list[Any]], Any], examples: Sequence[Example]) -> Any:
    return collator([sequence for example in examples for sequence in example])
