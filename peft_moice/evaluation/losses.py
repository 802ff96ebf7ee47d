"""Loss by position in running text, and perplexity: does a model use what it read long ago, and what does an adapter
cost where it has nothing to repair?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..probing.evaluation_mode import evaluating

_PART = 512


@dataclass(frozen=True)
class PositionLosses:
    """Mean loss by position.

    Attributes:
        edges: positions at which buckets end, ascending; a bucket holds the positions from the end of the one before
            (the first: from 1, since nothing predicts the token at 0) up to its own end, left out.
        losses: mean loss of each bucket, in nats.
        chunks: number of chunks that were read.
    """

    edges: tuple[int, ...]
    losses: tuple[float, ...]
    chunks: int

    @property
    def centers(self) -> tuple[float, ...]:
        """The middle of each bucket, in tokens."""
        starts = (1, *self.edges[:-1])
        return tuple((start + end - 1) / 2 for start, end in zip(starts, self.edges, strict=True))

    @property
    def perplexity(self) -> float:
        """Of all tokens that were predicted."""
        return math.exp(self.mean())

    def mean(self, start: int = 1, end: float = math.inf) -> float:
        """Mean loss of the buckets that lie between two positions. Default: of all.

        Raises:
            ValueError: none does.
        """
        buckets = zip(self.edges, self.losses, _sizes(self.edges), strict=True)
        chosen = [(loss * size, size) for edge, loss, size in buckets if start <= edge - size and edge <= end]
        if not chosen:
            raise ValueError(f"No bucket lies between positions {start} and {end}; they end at {self.edges}.")
        return sum(total for total, _ in chosen) / sum(size for _, size in chosen)


def chunks_of(tokenizer: Any, text: str, length: int, max_chunks: int | None = None) -> torch.Tensor:
    """Consecutive chunks `[chunks, length]` of the tokens of a text; a rest shorter than a chunk is dropped.

    Raises:
        ValueError: the text is shorter than one chunk, or a value is out of its range.
    """
    if length < 2 or (max_chunks is not None and max_chunks < 1):
        raise ValueError(
            f"`chunk_length` has to be at least 2 and `max_chunks` at least 1, not {length} and {max_chunks}."
        )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    chunks = torch.tensor(tokens, device="cpu")[: len(tokens) // length * length].view(-1, length)[:max_chunks]
    if not len(chunks):
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than a chunk of {length}. Give more, or lower `chunk_length`."
        )
    return chunks


def token_losses(model: Any, chunk: torch.Tensor) -> torch.Tensor:
    """Losses `[length - 1]` in float32 of the tokens of `chunk` `[length]` but the first."""
    chunk = chunk.to(model.device)
    logits = model(input_ids=chunk[None], use_cache=False).logits[0, -len(chunk) : -1]  # behind virtual tokens
    # In parts: the loss holds another copy of its logits, gigabytes of them for a long chunk.
    parts = zip(logits.split(_PART), chunk[1:].to(logits.device).split(_PART), strict=True)
    return torch.cat([nn.functional.cross_entropy(part.float(), tokens, reduction="none") for part, tokens in parts])


def losses_by_position(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    chunk_length: int = 2048,
    max_chunks: int | None = None,
    edges: Sequence[int] | None = None,
) -> PositionLosses:
    """Mean loss of the tokens of `text` by their position in chunks.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text of at least one chunk; a rest shorter than a chunk is dropped.
        chunk_length: number of tokens in a chunk, at least 2. Default: 2048.
        max_chunks: number of chunks to read. Default: all.
        edges: positions at which buckets end, ascending from 2 on to `chunk_length`. Default: buckets that double, 1,
            2-3, 4-7, ...

    Raises:
        ValueError: the text is shorter than one chunk, or a value is out of its range.
    """
    if edges is None:
        edges = [min(2**power, chunk_length) for power in range(1, (chunk_length - 1).bit_length() + 1)]
    if not edges or edges[0] < 2 or edges[-1] != chunk_length or min(_sizes(edges)) < 1:
        raise ValueError(f"`edges` are {list(edges)}, but have to ascend from 2 on to {chunk_length}, `chunk_length`.")
    chunks = chunks_of(tokenizer, text, chunk_length, max_chunks)
    total = torch.zeros(chunk_length - 1, dtype=torch.float64, device="cpu")
    with evaluating(model):
        for chunk in tqdm(chunks, desc="loss of text", unit="chunk"):
            total += token_losses(model, chunk).double().cpu()
    losses = [part.mean().item() / len(chunks) for part in torch.split(total, _sizes(edges))]
    return PositionLosses(tuple(edges), tuple(losses), len(chunks))


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, chunk_length: int = 1024, max_chunks: int | None = None
) -> float:
    """Perplexity of `text`, cut into consecutive chunks that are read independently.

    Every token of a chunk but the first is predicted from those before it in the chunk. Arguments and errors are those
    of [`losses_by_position`]; `chunk_length` is 1024 by default.
    """
    return losses_by_position(model, tokenizer, text, chunk_length=chunk_length, max_chunks=max_chunks).perplexity


def _sizes(edges: Sequence[int]) -> list[int]:
    """Numbers of positions in buckets."""
    return [end - start for start, end in zip([1, *edges], edges, strict=False)]
