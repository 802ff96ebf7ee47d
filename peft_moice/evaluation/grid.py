"""Runs a model over a grid of positions and lengths of a task."""

import random
import re
import string
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..probing.evaluation_mode import evaluating
from ..training.data.sequences import encode_marked, render_chat
from .reader import Reader
from .result import Result, Score
from .task import POSITIONS, Example, Scoring, Task


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    lengths: Sequence[int],
    positions: Sequence[float] = POSITIONS,
    num_groups: int = 16,
    max_new_tokens: int = 48,
    batch_size: int | None = None,
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
        num_groups: number of draws at every length, which is the number of questions in a cell. What a task has drawn
            before is not asked again, so a small file may give fewer. Default: 16.
        max_new_tokens: the most that the model writes, where the task's scoring reads what it writes, at least 1.
            Default: 48.
        batch_size: without effect; goes in version 0.4.
        seed: of the draws. Equal seeds ask different models the same questions. Default: 0.
        name: of the model, for tables and pictures. Default: the one in its config.

    Returns:
        The score and the loss of every question.

    Raises:
        ValueError: a value out of its range.
    """
    check_grid(lengths, positions, num_groups)
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {max_new_tokens}, but has to be at least 1.")
    if batch_size is not None:
        warnings.warn("`batch_size` has no effect, and goes in version 0.4.", FutureWarning, stacklevel=2)
    scores: list[Score] = []
    with evaluating(model), tqdm(total=num_groups * len(lengths), desc=task.name, unit="draw") as progress:
        for length in lengths:
            rng = random.Random(f"{seed} {length}")
            asked: set[Example] = set()
            for group in range(num_groups):
                examples = [example for example in task.draw(rng, length, positions) if example not in asked]
                asked.update(examples)
                reader = Reader(model)
                for example in examples:
                    scores.append(score_example(reader, tokenizer, task, example, group, max_new_tokens))
                progress.update()
    name = getattr(model.config, "_name_or_path", "") if name is None else name
    return Result(task=task.name, unit=task.unit, model=name, seed=seed, scores=tuple(scores))


def try_task(
    task: Task, tokenizer: Any, lengths: Sequence[int], positions: Sequence[float], num_groups: int
) -> dict[int, int]:
    """Tokens of one example of a task at every length, drawn and encoded as [`evaluate`] will do it.

    Raises:
        ValueError: a value out of its range; the task has too little material, or none of an answer has tokens.
    """
    check_grid(lengths, positions, num_groups)
    drawn = {length: task.draw(random.Random(0), length, positions)[0] for length in lengths}
    return {length: len(encode_example(tokenizer, one, one.answers[0])[0]) for length, one in drawn.items()}


def check_grid(lengths: Sequence[int], positions: Sequence[float], num_groups: int) -> None:
    """Raise a ValueError for what [`evaluate`] cannot run over."""
    if num_groups < 1:
        raise ValueError(f"`num_groups` is {num_groups}, but has to be at least 1.")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"`lengths` has to hold positive numbers, not {list(lengths)}.")
    for name, values in (("lengths", lengths), ("positions", positions)):
        if len(set(values)) < len(values):
            raise ValueError(
                f"`{name}` names a value twice: {list(values)}. Its questions would count twice; drop one."
            )
    if not positions or not all(0 <= position <= 1 for position in positions):
        raise ValueError(f"`positions` has to hold numbers in 0..1, not {positions!r}.")


def encode_example(tokenizer: Any, example: Example, answer: str) -> tuple[list[int], int]:
    """Token ids of a prompt, in the tokenizer's chat template if it has one, with an answer to it; and the index of
    the first token of the answer.

    Raises:
        ValueError: the tokenizer is a slow one, its chat template refuses the prompt, or the answer is empty.
    """
    messages = [{"role": "user", "content": example.prompt}]
    before = render_chat(tokenizer, messages, add_generation_prompt=True) + example.opening
    ids, is_answer = encode_marked(tokenizer, before + answer, [(len(before), len(before) + len(answer))])
    # Tokens of words may begin with the space before them. Some tokenizers put an end of the text behind it, which is
    # no part of the answer, and stands for no characters.
    tokens = [index for index, belongs in enumerate(is_answer) if belongs]
    if not tokens or not answer.strip():
        raise ValueError(f"The answer {answer!r} has no tokens. Give answers that are not empty.")
    return ids[: tokens[-1] + 1], tokens[0]


def score_example(
    reader: Reader, tokenizer: Any, task: Task, example: Example, group: int, max_new_tokens: int
) -> Score:
    """Ask a question of a draw."""
    texts = [encode_example(tokenizer, example, text) for text in _texts(task, example)]
    (loss, tokens, exact), *others = [_compare(reader.logits(ids, start), ids[start:]) for ids, start in texts]
    if task.scoring == "exact":
        score = float(exact)
    elif task.scoring == "choice":
        score = float(all(loss < other for other, _, _ in others))
    else:
        ids, start = texts[0]
        score = _write(reader, tokenizer, task.scoring, example, ids[:start], max_new_tokens)
    return Score(group, example.length, example.position, score, loss, tokens)


def _texts(task: Task, example: Example) -> list[str]:
    """The right answer, and with the scoring "choice" the wrong ones behind it."""
    if task.scoring == "choice":
        return list(dict.fromkeys([example.answers[0], *example.choices]))
    return [", ".join(example.answers) if task.scoring == "all" else example.answers[0]]


def contained(scoring: Scoring, answers: Sequence[str], written: str) -> float:
    """The score of a text with the scorings "any" and "all"."""
    if scoring == "any":
        line = written.partition("\n")[0]
        return float(any(part in normalized(line) for part in filter(None, map(normalized, answers))))
    return sum(bool(answer) and answer.lower() in written.lower() for answer in answers) / len(answers)


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and repeated spaces, as SQuAD's metric compares answers."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _compare(logits: torch.Tensor, answer: list[int]) -> tuple[float, float, bool]:
    """Loss of an answer, the share of its tokens that are first choices, and whether all are."""
    target = torch.tensor(answer, device=logits.device)
    hits = logits[:-1].argmax(-1) == target
    loss = nn.functional.cross_entropy(logits[:-1], target).item()
    return loss, hits.float().mean().item(), bool(hits.all())


def _write(
    reader: Reader, tokenizer: Any, scoring: Scoring, example: Example, prompt: list[int], max_new_tokens: int
) -> float:
    """The score of what the model writes after a prompt, which ends as soon as nothing can change the score."""

    def is_settled(written: list[int]) -> bool:
        text = tokenizer.decode(written)
        return contained(scoring, example.answers, text) == 1 or (scoring == "any" and "\n" in text)

    end = _end_tokens(reader.model, tokenizer)
    written = reader.write(prompt, max_new_tokens, end, is_settled)
    return contained(scoring, example.answers, tokenizer.decode(written))


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
