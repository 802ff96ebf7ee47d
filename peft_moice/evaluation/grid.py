"""Runs a model over a grid of positions and lengths of a task."""

import random
import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..mode import evaluating
from .encoding import encode_example
from .reader import Reader
from .result import Result, Score
from .task import POSITIONS, Example, Task
from .trial import check_grid


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    lengths: Sequence[int],
    positions: Sequence[float] = POSITIONS,
    num_groups: int = 16,
    max_new_tokens: int = 48,
    seed: int = 0,
    name: str | None = None,
) -> Result:
    """Ask `model` the questions of a task, for every length and position.

    Args:
        model: a causal language model of transformers, adapted or not.
        tokenizer: its tokenizer, a fast one.
        task: what to ask.
        lengths: how much material a prompt shows, in the task's unit.
        positions: relative positions of what is asked for. Default: 0, 1/4, 1/2, 3/4, 1.
        num_groups: number of draws at every length, which is the number of questions in a cell. Default: 16.
        max_new_tokens: the most that the model writes, where the task's scoring reads what it writes. Default: 48.
        seed: of the draws. Equal seeds ask different models the same questions. Default: 0.
        name: of the model, for tables and pictures. Default: the one in its config.

    Returns:
        The score and the loss of every question.

    Raises:
        ValueError: a value out of its range.
    """
    check_grid(lengths, positions, num_groups)
    scores = []
    with evaluating(model), tqdm(total=num_groups * len(lengths), desc=task.name, unit="draw") as progress:
        for length in lengths:
            rng = random.Random(f"{seed} {length}")
            for group in range(num_groups):
                reader = Reader(model)
                for example in task.draw(rng, length, positions):
                    scores.append(score_example(reader, tokenizer, task, example, group, max_new_tokens))
                progress.update()
    name = getattr(model.config, "_name_or_path", "") if name is None else name
    return Result(task=task.name, unit=task.unit, model=name, seed=seed, scores=tuple(scores))


def score_example(
    reader: Reader, tokenizer: Any, task: Task, example: Example, group: int, max_new_tokens: int
) -> Score:
    """Ask one question."""
    answer = ", ".join(example.answers) if task.scoring == "all" else example.answers[0]
    loss, tokens, exact = _forced(reader, tokenizer, example, answer)
    if task.scoring == "exact":
        score = float(exact)
    elif task.scoring == "choice":
        others = [choice for choice in example.choices if choice != answer]
        score = float(all(loss < _forced(reader, tokenizer, example, choice)[0] for choice in others))
    else:
        encoded = encode_example(tokenizer, example, answer)
        end = _end_tokens(reader.model, tokenizer)
        written = tokenizer.decode(reader.write(encoded.input_ids[: encoded.start], max_new_tokens, end))
        found = [normalized(right) in normalized(written) for right in example.answers]
        score = float(any(found)) if task.scoring == "any" else sum(found) / len(found)
    return Score(group, example.length, example.position, score, loss, tokens)


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and repeated spaces, as SQuAD's metric compares answers."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _forced(reader: Reader, tokenizer: Any, example: Example, answer: str) -> tuple[float, float, bool]:
    """Loss of an answer, the share of its tokens that are first choices, and whether all are."""
    encoded = encode_example(tokenizer, example, answer)
    logits = reader.logits(encoded.input_ids, encoded.start)[:-1]
    target = torch.tensor(encoded.input_ids[encoded.start :], device=logits.device)
    hits = logits.argmax(-1) == target
    return nn.functional.cross_entropy(logits, target).item(), hits.float().mean().item(), bool(hits.all())


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
