"""Perplexity of running text: what an adapter costs where it has nothing to repair."""

import math
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .mode import evaluating


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    chunk_length: int = 1024,
    max_chunks: int | None = None,
) -> float:
    """Perplexity of `text`, cut into consecutive chunks that are read independently.

    Every token of a chunk but the first is predicted from those before it in the chunk.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text of at least one chunk; a rest shorter than a chunk is dropped.
        chunk_length: number of tokens in a chunk, at least 2. Default: 1024.
        max_chunks: number of chunks to read. Default: all.

    Raises:
        ValueError: the text is shorter than one chunk, or a value is out of its range.
    """
    if chunk_length < 2 or (max_chunks is not None and max_chunks < 1):
        raise ValueError(
            f"`chunk_length` has to be at least 2 and `max_chunks` at least 1, not {chunk_length} and {max_chunks}."
        )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    chunks = torch.tensor(tokens)[: len(tokens) // chunk_length * chunk_length].view(-1, chunk_length)[:max_chunks]
    if not len(chunks):
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than one chunk of {chunk_length}. Give more text or lower "
            "`chunk_length`."
        )
    loss = 0.0
    with evaluating(model):
        for chunk in tqdm(chunks, desc="perplexity", unit="chunk"):
            chunk = chunk.to(model.device)
            logits = model(input_ids=chunk[None], use_cache=False).logits[0, :-1].float()
            loss += nn.functional.cross_entropy(logits, chunk[1:].to(logits.device)).item()
    return math.exp(loss / len(chunks))
