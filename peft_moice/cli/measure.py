"""`peft-moice measure`: where does a model lose facts, and does an adapter repair it?"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from ..evaluation import (
    POSITIONS,
    Facts,
    KeyValues,
    Needles,
    PositionLosses,
    Result,
    Task,
    evaluate,
    losses_by_position,
)
from ..evaluation.grid import try_task
from ..evaluation.needles import Kind
from ..evaluation.plotting import plot_losses
from ..training.data import read_text
from ..tuner.config import MoICEConfig
from .models import ModelArguments, base_name, load_model, load_tokenizer
from .pace import in_words
from .parsing import Outcome, Parser, UsageError, can_draw, option, output_folder
from .tables import difference, score_table, verdict

logger = logging.getLogger(__name__)

SUMMARY = "where does a model lose facts, and does an adapter repair it? Table and pictures; trains nothing"
NEEDLES: dict[str, Kind] = {"needles": "single", "keys": "keys", "values": "values", "variables": "variables"}
_WITHOUT_FILES = ("facts", "key_values")
_MAX_CHUNKS = 16

_EPILOG = """tasks (--tasks; 'right' is decided by greedy decoding, loss is that of the right answer)
  facts       a list of invented facts, one asked for; --items facts, up to 67. Default without --documents
  key_values  a JSON object of random keys and values, one asked for; --items pairs
  needles     a number hidden in your own documents; --lengths tokens.          Default with --documents: needles keys
  keys        the same, among the numbers of three other keys
  values      the same, all four numbers of one key
  variables   a chain of assignments (needles to variables: definitions of RULER)

Documents are files of text (UTF-8); perplexity and loss by position are measured on their first 16 chunks as well.
Scores are written to --output_dir as soon as a task is done at a length, so Ctrl-C loses only what is under way.

examples
  peft-moice measure --model HuggingFaceTB/SmolLM2-135M-Instruct
  peft-moice measure --adapter outputs/routers --documents notes/*.txt --lengths 512 1024 4096"""


@dataclass
class Arguments(ModelArguments):
    """What to measure."""

    adapter: list[str] = option("Folders or Hub ids of adapters of PEFT, of any type, measured beside their base.", [])
    documents: list[str] = option("Files of your own text.", [])
    tasks: list[str] | None = option("What to ask, see below.", None)
    lengths: list[int] = option("Tokens of your text in a prompt.", [512, 1024])
    items: list[int] = option("Facts or pairs in a prompt.", [16, 30, 45])
    positions: list[float] = option("0 first to 1 last.", list(POSITIONS))
    questions: int = option("Questions at each position and length.", 8)
    chunk_length: int | None = option(
        "Tokens of a chunk of the documents, for loss and perplexity. Default: 1024; beside an adapter that extends "
        "the window, the longest of --lengths.",
        None,
    )
    seed: int = option("Of the questions; equal seeds ask the same.", 0)
    output_dir: str = option("Folder for scores and pictures.", "outputs/measure")


def parser() -> Parser:
    """Of the command's arguments."""
    usage = "--model MODEL [--adapter ADAPTER ...] [--documents FILE ...] [options] [--json]"
    return Parser("measure", (Arguments,), usage=usage, summary=SUMMARY, epilog=_EPILOG)


@dataclass
class Measured:
    """What one model scored, by task and on the documents; not finished where it was interrupted."""

    name: str
    results: dict[str, Result] = field(default_factory=dict)
    losses: PositionLosses | None = None


def run(args: Arguments) -> Outcome:
    """Check, load, measure, report."""
    text = "\n\n".join(read_text(file) for file in args.documents)
    base, tokenizer = common_base(args.model, args.adapter)
    names = chosen_tasks(args, text)
    output_dir = output_folder(args.output_dir)
    window = extended_window(args.adapter)
    if args.chunk_length is None:
        args.chunk_length = 1024 if window is None else max(args.lengths)
    if window is not None and window >= args.chunk_length:
        window = None
    quantization = args.quantization()
    tasks = make_tasks(names, args, text, tokenizer)
    # What cannot be asked shows before a model is loaded.
    sizes = [try_task(task, tokenizer, lengths, args.positions, args.questions) for task, lengths in tasks]
    num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if args.documents and num_tokens < args.chunk_length:
        logger.warning(
            "Perplexity and loss by position are not measured: the documents have %d tokens, fewer than a chunk "
            "(--chunk_length %d).",
            *(num_tokens, args.chunk_length),
        )
    is_drawn = can_draw()

    asked = sum(map(len, sizes)) * len(args.positions) * args.questions
    longest = max(tokens for prompts in sizes for tokens in prompts.values())
    logger.info(
        "%s questions about prompts of up to %s tokens, put to %d models in turn.",
        *(f"{asked:,}", f"{longest:,}", 1 + len(args.adapter)),
    )
    measured: list[Measured] = []
    interrupted = False
    try:
        model = load_model(base, args.dtype, quantization=quantization)
        tell_pace(model, tokenizer, tasks[0], sizes, args)
        for name, adapter in variants(base, args.adapter):
            if isinstance(model, PeftModel):
                # Virtual tokens are no modules in the base model, which is as it was.
                model = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
            measured.append(Measured(name))
            running = text if num_tokens >= args.chunk_length else ""
            for _ in measure(model, tokenizer, tasks, running, args, measured[-1], window):
                write(measured, output_dir)
    except KeyboardInterrupt:
        if not any(one.results for one in measured):
            raise
        interrupted = True
    write(measured, output_dir)
    if is_drawn:
        draw(measured, output_dir)
    where = f"Scores{' and pictures' * is_drawn} are in {output_dir}."
    return Outcome(_as_text(measured, where, interrupted, window), _as_values(measured, output_dir), interrupted)


def extended_window(adapters: Sequence[str]) -> int | None:
    """The window that some adapter extends: where the first of its ropes by position ends."""
    for adapter in adapters:
        config = PeftConfig.from_pretrained(adapter)
        experts = config.ropes_by_position() if isinstance(config, MoICEConfig) else ()
        if experts and experts[0].end is not None:
            return experts[0].end
    return None


def chosen_tasks(args: Arguments, text: str) -> list[str]:
    """Names of tasks to run."""
    default = ["needles", "keys"] if args.documents else ["facts"]
    names = default if args.tasks is None else list(dict.fromkeys(args.tasks))
    if unknown := sorted(set(names) - {*NEEDLES, *_WITHOUT_FILES}):
        raise UsageError(f"--tasks names {unknown}; choose among {', '.join([*_WITHOUT_FILES, *NEEDLES])}.")
    if NEEDLES.keys() & set(names) and not text.strip():
        raise UsageError(
            f"--tasks {' '.join(names)} hides numbers in your text, but --documents "
            f"{' '.join(args.documents) or 'was not given'} holds none. Name files of text."
        )
    return names


def make_tasks(names: list[str], args: Arguments, text: str, tokenizer: Any) -> list[tuple[Task, list[int]]]:
    """Tasks with the lengths to run them at."""
    tasks: list[tuple[Task, list[int]]] = [
        (Needles(text, tokenizer, NEEDLES[name]), args.lengths) for name in names if name in NEEDLES
    ]
    if "key_values" in names:
        tasks.append((KeyValues(), args.items))
    if "facts" in names:
        tasks.append((Facts(), args.items))
    return tasks


def common_base(model: str | None, adapters: Sequence[str]) -> tuple[str, Any]:
    """Name of the model to measure, which all adapters have to be of, and the tokenizer that they share."""
    if len(set(adapters)) < len(adapters):
        raise UsageError(f"--adapter {' '.join(adapters)} names one twice. Drop it.")
    each: Sequence[str | None] = adapters or [None]
    bases = dict.fromkeys(base_name(model, adapter) for adapter in each)
    if len(bases) > 1:
        raise UsageError(
            f"the adapters have different base models, {', '.join(bases)}. Measure them one by one, or name the "
            "model for all with --model."
        )
    (base,) = bases
    tokenizers = [load_tokenizer(base, adapter) for adapter in each]
    if len({tokenizer.chat_template for tokenizer in tokenizers}) > 1:
        raise UsageError("the adapters were trained with different chat templates. Measure them one by one.")
    return base, tokenizers[0]


def variants(base: str, adapters: Sequence[str]) -> list[tuple[str, str | None]]:
    """Names of the models to measure, and their adapters."""
    name = Path(base).name
    short = [Path(adapter).name for adapter in adapters]
    names = short if len(set(short)) == len(short) else adapters
    return [(name, None), *((f"{name} with {own}", adapter) for own, adapter in zip(names, adapters, strict=True))]


def tell_pace(
    model: Any, tokenizer: Any, first: tuple[Task, list[int]], sizes: list[dict[int, int]], args: Arguments
) -> None:
    """Ask one draw of the first task, the shortest, and log how long all take by its pace and their `sizes`: of each
    task, the tokens of a prompt by length.
    """
    task, lengths = first
    begun = time.perf_counter()
    evaluate(model, tokenizer, task, lengths=[min(lengths)], positions=args.positions, num_groups=1)
    seconds = time.perf_counter() - begun
    all_tokens = sum(sum(prompts.values()) for prompts in sizes) * args.questions * (1 + len(args.adapter))
    logger.info(
        "The first %d took %s; all take about %s. Fewer --questions or models, and shorter prompts, take less.",
        *(len(args.positions), in_words(seconds), in_words(seconds * all_tokens / sizes[0][min(lengths)])),
    )


def measure(
    model: Any,
    tokenizer: Any,
    tasks: list[tuple[Task, list[int]]],
    text: str,
    args: Arguments,
    measured: Measured,
    window: int | None = None,
) -> Iterator[None]:
    """Fill `measured`, and stop by after every task and length. Losses are cut at `window`."""
    for task, lengths in tasks:
        for length in sorted(lengths):
            result = evaluate(
                model,
                tokenizer,
                task,
                lengths=[length],
                positions=tuple(args.positions),
                num_groups=args.questions,
                seed=args.seed,
                name=measured.name,
            )
            before = measured.results.get(task.name)
            measured.results[task.name] = (
                result if before is None else replace(before, scores=before.scores + result.scores)
            )
            yield
    if text:
        length = args.chunk_length or 1024
        edges = None if window is None else sorted({window, length, *(2**power for power in range(1, 30))})
        measured.losses = losses_by_position(
            model,
            tokenizer,
            text,
            chunk_length=length,
            max_chunks=_MAX_CHUNKS,
            edges=edges and [edge for edge in edges if edge <= length],
        )
        yield


def write(measured: list[Measured], output_dir: Path) -> None:
    """Scores of what is there by now."""
    for number, one in enumerate(measured):
        for task, result in one.results.items():
            result.save(output_dir / f"{_file_name(task)}_{number}.json")
    losses = {one.name: asdict(one.losses) for one in measured if one.losses is not None}
    if losses:
        (output_dir / "losses.json").write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


def draw(measured: list[Measured], output_dir: Path) -> None:
    """Pictures of the same."""
    for number, one in enumerate(measured):
        for task, result in one.results.items():
            result.plot().savefig(output_dir / f"{_file_name(task)}_{number}.png", dpi=150)
    for task, result, *rivals in _by_task(measured):
        if rivals and all(rival.lengths == result.lengths for rival in rivals):
            result.plot(rivals).savefig(output_dir / f"{_file_name(task)}.png", dpi=150)
    losses = {one.name: one.losses for one in measured if one.losses is not None}
    if losses:
        plot_losses(losses, title="your documents").savefig(output_dir / "losses.png", dpi=150)


def _by_task(measured: list[Measured]) -> Iterator[tuple[Any, ...]]:
    """A task's name, and the results of all models on it."""
    for task in measured[0].results:
        yield task, *(one.results[task] for one in measured if task in one.results)


def _as_text(measured: list[Measured], where: str, interrupted: bool, window: int | None = None) -> str:
    parts = [score_table(list(results)) for _, *results in _by_task(measured)]
    parts += [
        f"perplexity of your documents ({one.losses.chunks * one.losses.edges[-1]:,} tokens), {one.name}: "
        f"{one.losses.perplexity:.3f}"
        for one in measured
        if one.losses is not None
    ]
    if window is not None:
        parts += [
            f"loss of your documents, window of {window:,} tokens, {one.name}: "
            f"{one.losses.mean(end=window):.3f} within, {one.losses.mean(start=window):.3f} beyond"
            for one in measured
            if one.losses is not None
        ]
    base, *adapted = measured
    parts += [verdict(result) for result in base.results.values()]
    parts += ["\n".join(lines) for one in adapted if (lines := _changes(one, base))]
    if interrupted:
        parts.append("Interrupted: this is what was finished.")
    parts.append(where)
    return "\n\n".join(parts)


def _changes(one: Measured, base: Measured) -> list[str]:
    """What an adapter changed, a line for each task; the cost on ordinary text stands at the end of each."""
    cost = ""
    if one.losses is not None and base.losses is not None:
        cost = f", perplexity {one.losses.perplexity / base.losses.perplexity - 1:+.1%}"
    return [
        difference(one.name.removeprefix(f"{base.name} with "), result, base.results[task]) + cost + "."
        for task, result in one.results.items()
        if result.lengths == base.results[task].lengths
    ]


def _as_values(measured: list[Measured], output_dir: Path) -> dict[str, Any]:
    models = [
        {
            "model": one.name,
            "tasks": [
                {"task": task, "unit": result.unit, "cells": result.to_dict()["cells"]}
                for task, result in one.results.items()
            ],
            "perplexity": one.losses and one.losses.perplexity,
        }
        for one in measured
    ]
    return {"output_dir": str(output_dir), "models": models}


def _file_name(task: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in task)
