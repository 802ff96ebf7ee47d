"""`peft-moice measure`: where does a model lose facts, and does an adapter repair it?"""

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from ..evaluation import (
    POSITIONS,
    Facts,
    KeyValues,
    MultiDocument,
    Needles,
    PositionLosses,
    Result,
    Task,
    evaluate,
    losses_by_position,
)
from ..evaluation.needles import Kind
from ..evaluation.plotting import plot_losses
from ..evaluation.trial import try_task
from ..training.data import read_text
from ..tuner.config import MoICEConfig
from .models import Dtype, base_name, load_model, load_tokenizer
from .parsing import Outcome, Parser, UsageError, output_folder
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
  also        --key_value_file and --question_file of "Lost in the Middle", by their paths

Documents are files of text (UTF-8); perplexity and loss by position are measured on their first 16 chunks as well.
Scores are written to --output_dir as soon as a task is done at a length, so Ctrl-C loses only what is under way.

examples
  peft-moice measure --model HuggingFaceTB/SmolLM2-135M-Instruct
  peft-moice measure --adapter outputs/routers --documents notes/*.txt --lengths 512 1024 4096"""


@dataclass
class Arguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: the base of --adapter."})
    adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids of adapters of PEFT, of any type, measured beside their base."},
    )
    documents: list[str] = field(default_factory=list, metadata={"help": "Files of your own text."})
    tasks: list[str] | None = field(default=None, metadata={"help": "What to ask, see below."})
    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048], metadata={"help": "Tokens of your text in a prompt."}
    )
    items: list[int] = field(default_factory=lambda: [16, 30, 45], metadata={"help": "Facts or pairs in a prompt."})
    positions: list[float] = field(default_factory=lambda: list(POSITIONS), metadata={"help": "0 first to 1 last."})
    questions: int = field(default=16, metadata={"help": "Questions at each position and length."})
    batch_size: int = field(default=1, metadata={"help": "Questions read at once; more is faster on a GPU."})
    key_value_file: str | None = field(default=None, metadata={"help": "kv-retrieval-*.jsonl.gz, --items pairs each."})
    question_file: str | None = field(default=None, metadata={"help": "nq-open-oracle.jsonl.gz, --passages each."})
    passages: list[int] = field(default_factory=lambda: [10], metadata={"help": "Passages in a prompt of questions."})
    chunk_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a chunk of the documents, for loss and perplexity. Default: 1024; the longest of "
            "--lengths beside an adapter that extends the window."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the questions; equal seeds ask the same."})
    dtype: Dtype | None = field(
        default=None,
        metadata={"help": "auto (its own), float32, bfloat16, float16. Default: float32 on a CPU, else auto."},
    )
    output_dir: str = field(default="outputs/measure", metadata={"help": "Folder for scores and pictures."})


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of the command."""
    parser = Parser(
        "measure",
        (Arguments,),
        usage="--model MODEL [--adapter ADAPTER ...] [--documents FILE ...] [options] [--json]",
        summary=SUMMARY,
        epilog=_EPILOG,
    )
    parsed: Arguments = parser.parse(argv)[0]
    return parsed


@dataclass
class Measured:
    """What one model scored; not finished where it was interrupted.

    Attributes:
        name: of the model.
        adapter: folder or Hub id of its adapter; None for the base model.
        results: by task.
        losses: on the documents by position, None without enough text.
    """

    name: str
    adapter: str | None = None
    results: dict[str, Result] = field(default_factory=dict)
    losses: PositionLosses | None = None

    def on_both_sides(self, window: int) -> str:
        """The mean losses within a window and beyond it, where a bucket of positions ends there."""
        assert self.losses is not None
        edges, values = self.losses.edges, self.losses.losses
        sizes = [end - start for start, end in zip((1, *edges), edges, strict=False)]
        cut = edges.index(window) + 1
        within, beyond = (
            sum(loss * size for loss, size in zip(values[part], sizes[part], strict=True)) / sum(sizes[part])
            for part in (slice(cut), slice(cut, None))
        )
        return f"{self.name}: {within:.3f} within, {beyond:.3f} beyond"


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
    tasks = make_tasks(names, args, text, tokenizer)
    for task, lengths in tasks:
        # What cannot be asked shows before a model is loaded.
        try_task(task, tokenizer, lengths, args.positions, args.questions)
    num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if args.documents and num_tokens < args.chunk_length:
        logger.warning(
            "Perplexity and loss by position are not measured: the documents have %d tokens, fewer than a chunk "
            "(--chunk_length %d).",
            *(num_tokens, args.chunk_length),
        )
    can_draw = importlib.util.find_spec("matplotlib") is not None
    if not can_draw:
        logger.warning("Without matplotlib no pictures are drawn: pip install 'peft_moice[plot]'.")

    asked = sum(len(lengths) for _, lengths in tasks) * len(args.positions) * args.questions
    logger.info("%s questions, put to %d models in turn.", f"{asked:,}", 1 + len(args.adapter))
    measured: list[Measured] = []
    interrupted = False
    try:
        model = load_model(base, args.dtype)
        for name, adapter in variants(base, args.adapter):
            if isinstance(model, PeftModel):
                # Virtual tokens are no modules in the base model, which is as it was.
                model = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
            measured.append(Measured(name, adapter))
            running = text if num_tokens >= args.chunk_length else ""
            for _ in measure(model, tokenizer, tasks, running, args, measured[-1], window):
                write(measured, output_dir)
    except KeyboardInterrupt:
        if not any(one.results for one in measured):
            raise
        interrupted = True
    write(measured, output_dir)
    if can_draw:
        draw(measured, output_dir)
    where = f"Scores{' and pictures' * can_draw} are in {output_dir}."
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
    """Names of tasks to run.

    Raises:
        UsageError: an unknown name, or a task over documents without text.
    """
    with_files = bool(args.key_value_file or args.question_file)
    default = ["needles", "keys"] if args.documents else [] if with_files else ["facts"]
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
    if "key_values" in names or args.key_value_file:
        tasks.append((KeyValues(file=args.key_value_file), args.items))
    if "facts" in names:
        tasks.append((Facts(), args.items))
    if args.question_file:
        tasks.append((MultiDocument(args.question_file), args.passages))
    return tasks


def common_base(model: str | None, adapters: Sequence[str]) -> tuple[str, Any]:
    """Name of the model to measure, which all adapters are of, and its tokenizer.

    Raises:
        UsageError: adapters are named twice, or have different base models or chat templates.
    """
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
                batch_size=args.batch_size,
                seed=args.seed,
                name=measured.name,
            )
            before = measured.results.get(task.name)
            measured.results[task.name] = result if before is None else _joined(before, result)
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
    """Pictures of the same, where positions are known."""
    for number, one in enumerate(measured):
        for task, result in one.results.items():
            if not result.positions:
                continue
            result.plot().savefig(output_dir / f"{_file_name(task)}_{number}.png", dpi=150)
    for task, result, *rivals in _by_task(measured):
        if rivals and result.positions and all(rival.lengths == result.lengths for rival in rivals):
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
    if window is not None and (read := [one.on_both_sides(window) for one in measured if one.losses is not None]):
        parts.append(
            "\n".join([f"loss of your documents, window of {window:,} tokens", *(f"  {line}" for line in read)])
        )
    base, *adapted = measured
    parts += [verdict(result) for result in base.results.values() if result.positions]
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


def _joined(first: Result, second: Result) -> Result:
    return Result(first.task, first.unit, first.model, first.seed, (*first.scores, *second.scores))


def _file_name(task: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in task)
