"""Perplexity of running text: what an adapter costs where it has nothing to repair."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..probing.evaluation_mode import evaluating
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


def perplexities(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    chunk_lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    max_tokens: int | None = None,
) -> dict[int, float]:
    """Perplexity of the same tokens of `text`, cut into chunks of each length.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text of at least the longest chunk.
        chunk_lengths: numbers of tokens in a chunk, of which each divides the longest. Default: 512 to 8,192.
        max_tokens: number of tokens to read at every length, at least the longest. Default: all that fill chunks.

    Returns:
        The perplexity by chunk length.

    Raises:
        ValueError: the text is shorter than the longest chunk, or a value is out of its range.
    """
    if not chunk_lengths or any(max(chunk_lengths) % length for length in chunk_lengths if length > 0):
        raise ValueError(
            f"`chunk_lengths` is {list(chunk_lengths)}, but each has to divide the longest, so that all read the same "
            "tokens. Give powers of two."
        )
    longest = max(chunk_lengths)
    if max_tokens is not None and max_tokens < longest:
        raise ValueError(f"`max_tokens` is {max_tokens}, fewer than a chunk of {longest}. Raise it.")
    tokens = chunks_of(tokenizer, text, longest, None if max_tokens is None else max_tokens // longest).numel()
    return {
        length: perplexity(model, tokenizer, text, chunk_length=length, max_chunks=tokens // length)
        for length in chunk_lengths
    }
