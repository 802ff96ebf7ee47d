"""Does it help at this size? Routers and LoRA of equal size, trained on the same prompts, on tasks of other forms.

Both learn the five forms of examples/research/forms.py (tables, records, lists, facts in prose, lives of people), kept
near the base model on ordinary text. The rate of each is chosen on held-out prompts of these forms. Measured are JSON,
access codes and RULER's needles at 4,096 to 16,384 tokens; with lengths beyond the window, all read by `extend`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import train_from_scratch
import training
from forms import docstrings, draw
from models import number_of_parameters
from peft import PeftModel

from peft_moice import extend
from peft_moice.evaluation import Facts, KeyValues, Needles, Result, evaluate, perplexity
from peft_moice.evaluation.task import Task
from peft_moice.tuner.extending import window_of

LENGTHS = (4096, 8192, 16_384)
TRAINING = ["--bf16", "True", "--gradient_checkpointing", "True", "--per_device_eval_batch_size", "1"]
SMALL_TRAINING = ["--use_cpu", "True", "--keep_tokens", "64"]
POSITIONS = (0.0, 0.5, 1.0)
FRAME = 160
"""Tokens of a prompt beside its material, about."""
GROUPS = 24
PROMPTS, HELD_OUT, JOINED = 300, 32, 5
"""Prompts to learn and to choose rates by, and how many of forms.py stand in one: about 1,250 to 3,750 tokens."""
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "base": ("base", {}, ()),
    "routers": ("routers_greater", {"top_k": 2}, (5e-3, 2e-2, 5e-2)),
    "lora": ("lora", {"equal_size": True}, (5e-4, 2e-3, 5e-3)),
}
"""Method of examples/research/methods, options, rates. Routers mix two of 1, 1.5, 2, 3 and 4 times the own base."""
PAIRS = (("routers", "base"), ("lora", "base"), ("routers", "lora"))

WRITTEN = 48
"""Tokens that `evaluate` has written at most where it reads what is written."""


def write_prompts(folder: Path, *, small: bool, seed: int) -> dict[str, Path]:
    """Files of chats to learn and to choose by, of text that is kept, and of text that is measured."""
    rng, text = random.Random(seed), docstrings()
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("learned", "held_out")}
    joined = 1 if small else JOINED
    for name, count in zip(files, (2, 2) if small else (PROMPTS, HELD_OUT), strict=True):
        chats = [json.dumps({"messages": draw(rng, text, 4, joined)}) for _ in range(count)]
        files[name].write_text("\n".join(chats) + "\n", encoding="utf-8")
    files["kept"] = folder / "kept.txt"
    files["kept"].write_text(text, encoding="utf-8")
    return files


def train(
    method: str, load: Callable[[], tuple[Any, Any]], files: dict[str, Path], folder: Path, **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """A method's model, at the rate with the least loss on held-out prompts, its tokenizer, and what was found out.

    Args:
        method: a key of [`METHODS`].
        load: gives a fresh model and its tokenizer.
        files: of [`write_prompts`].
        folder: for adapters, one for each rate.
        options: `small` and `seed`.
    """
    name, changes, rates = METHODS[method]
    model, tokenizer = load()
    model = training.make(name, model, tokenizer, changes)
    found: dict[str, Any] = {"parameters": number_of_parameters(model), "held_out_loss": {}}
    for rate in rates[:1] if options["small"] else rates:
        model = training.make(name, load()[0], tokenizer, changes)
        words = ["--preset", "chats", "--train_files", str(files["learned"]), "--eval_files", str(files["held_out"])]
        words += ["--keep_files", str(files["kept"]), "--learning_rate", str(rate), "--seed", str(options["seed"])]
        words += ["--output_dir", str(folder / f"{method}_{rate:g}"), "--max_length", str(window_of(model.config))]
        words += SMALL_TRAINING if options["small"] else TRAINING
        found["held_out_loss"][rate] = training.train(model, tokenizer, words)
    if rates:
        found["rate"] = min(found["held_out_loss"], key=found["held_out_loss"].get)
        model = PeftModel.from_pretrained(load()[0], str(folder / f"{method}_{found['rate']:g}"))
    return model, tokenizer, found


def tasks_at(tokenizer: Any, text: str, length: int) -> list[tuple[Task, int]]:
    """Tasks with as much material as prompts of `length` tokens show."""
    tasks: list[tuple[Task, int]] = []
    for task in (KeyValues(), Facts()):
        (example,) = task.draw(random.Random(0), 20, (0.0,))
        each = len(tokenizer(example.prompt)["input_ids"]) / 20
        tasks.append((task, max(2, int((length - FRAME) / each))))
    return [*tasks, *((Needles(text, tokenizer, kind), length - FRAME) for kind in ("keys", "values"))]


def measure(model: Any, tokenizer: Any, text: str, *, small: bool, seed: int, name: str) -> tuple[list[Result], float]:
    """Results of every task and length, and the perplexity of ordinary text."""
    if small:
        model.config.max_position_embeddings = 320  # so that 512 tokens are beyond it
    lengths, window = (256, 512) if small else LENGTHS, window_of(model.config)
    if not small and window >= LENGTHS[-1]:
        lengths = (*lengths, window + window // 4)
    if lengths[-1] > window:
        model = extend(model, 2.0 ** (lengths[-1] // window).bit_length())
    options = {"positions": POSITIONS, "num_groups": 1 if small else GROUPS, "seed": seed, "name": name}
    options |= {"max_new_tokens": 4 if small else WRITTEN}
    results = [
        evaluate(model, tokenizer, task, lengths=[material], **options)
        for length in lengths
        for task, material in tasks_at(tokenizer, text, length)
    ]
    chunk = min(window, 256 if small else 4096)
    return results, perplexity(model, tokenizer, text, chunk_length=chunk, max_chunks=2 if small else 16)


def ordinary_text() -> str:
    """Source code of every tenth module of Python's standard library, which no prompt shows."""
    return bytes(train_from_scratch.read_sources()[1].tolist()).decode("utf-8", errors="ignore")


def verdict(results: dict[str, list[Result]], perplexities: dict[str, float]) -> str:
    """Markdown: differences by task with paired intervals, and what follows from all of them together."""
    lines = ["| task | length | " + " | ".join(f"{a} - {b}" for a, b in PAIRS) + " |", "|---" * (2 + len(PAIRS)) + "|"]
    for index, base in enumerate(results["base"]):
        differences = [results[after][index].difference(results[before][index]) for after, before in PAIRS]
        cells = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, (low, high) in differences]
        lines.append(f"| {base.task} | {base.lengths[0]:,} {base.unit} | " + " | ".join(cells) + " |")
    lines.append("")
    for after, before in PAIRS:
        mean, (low, high) = together(results[after]).difference(together(results[before]))
        says = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        lines.append(f"- **{after}: {says} {before}**, by {mean:+.3f} ({low:+.3f} to {high:+.3f}) over all tasks.")
    changes = (f"{name} {value:.3f} ({value / perplexities['base'] - 1:+.2%})" for name, value in perplexities.items())
    return "\n".join([*lines, f"- Perplexity of source code: {', '.join(changes)}.", ""])


def together(results: list[Result]) -> Result:
    """All questions of several tasks, each draw by itself."""
    scores = [
        replace(score, group=index * GROUPS + score.group) for index, one in enumerate(results) for score in one.scores
    ]
    return replace(results[0], task="all", scores=tuple(scores))
