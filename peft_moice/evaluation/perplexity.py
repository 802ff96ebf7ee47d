"""Perplexity of running text: what an adapter costs where it has nothing to repair."""

import math
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..mode import evaluating
from .losses import chunks_of, token_losses


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
    chunks = chunks_of(tokenizer, text, chunk_length, max_chunks)
    loss = 0.0
    with evaluating(model):
        for chunk in tqdm(chunks, desc="perplexity", unit="chunk"):
            loss += token_losses(model, chunk).mean().item()
    return math.exp(loss / len(chunks))
