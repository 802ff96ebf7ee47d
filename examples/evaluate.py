"""Does a model find what stands in your documents, wherever it stands? And does an adapter repair it?

Hides numbers in your own text at every position and length, asks for them, measures the loss on the text by position,
and prints a table; the pictures and all scores go to `--output_dir`. Nothing is trained, so it tells before any
training whether there is something to repair, and at which lengths.

    python examples/evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --documents notes/*.txt
    python examples/evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter outputs/routers \
        --documents notes/*.txt --tasks needles values key_values facts --lengths 512 1024 2048

`--adapter` is a folder or Hub id of any adapter of PEFT; the base model is then measured beside it. Tasks over your
documents (lengths in tokens): `needles` (one number), `keys` (a number among those of other keys), `values` (all
numbers of a key), `variables` (a chain of assignments), by the definitions of RULER. Tasks without documents:
`key_values` and `facts` (`--items`). With the files of "Lost in the Middle" and L-Eval: `--key_value_file`,
`--question_file` (`nq-open-oracle.jsonl.gz`), `--exam_files`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loading import load_model, read_text
from peft import PeftModel
from transformers import HfArgumentParser

from peft_moice.evaluation import (
    POSITIONS,
    Exam,
    Facts,
    KeyValues,
    MultiDocument,
    Needles,
    PositionLosses,
    Result,
    Task,
    evaluate,
    losses_by_position,
    perplexity,
)
from peft_moice.plotting import plot_losses

NEEDLES = {"needles": "single", "keys": "keys", "values": "values", "variables": "variables"}


@dataclass
class Arguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of an adapter, measured beside it."})
    documents: list[str] = field(default_factory=list, metadata={"help": "Files of your own text."})
    tasks: list[str] = field(
        default_factory=lambda: ["needles", "keys"],
        metadata={"help": f"Of {', '.join([*NEEDLES, 'key_values', 'facts'])}."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048], metadata={"help": "Tokens of text in a prompt."}
    )
    items: list[int] = field(default_factory=lambda: [16, 30], metadata={"help": "Pairs or facts in a prompt."})
    positions: list[float] = field(default_factory=lambda: list(POSITIONS), metadata={"help": "0 first to 1 last."})
    questions: int = field(default=16, metadata={"help": "Questions at each position and length."})
    key_value_file: str | None = field(default=None, metadata={"help": "kv-retrieval-*.jsonl.gz, --items pairs each."})
    question_file: str | None = field(default=None, metadata={"help": "nq-open-oracle.jsonl.gz."})
    passages: list[int] = field(default_factory=lambda: [10], metadata={"help": "Passages in a prompt of QA."})
    exam_files: list[str] = field(default_factory=list, metadata={"help": "Closed tasks of L-Eval."})
    chunk_length: int = field(default=1024, metadata={"help": "Tokens that the loss on documents is measured over."})
    seed: int = field(default=0, metadata={"help": "Seed of the questions."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder for scores and pictures."})


def main(args: Arguments) -> None:
    text = "\n\n".join(read_text(file) for file in args.documents)
    check(args, text)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model)
    tasks = make_tasks(args, text, tokenizer)
    base_name = Path(args.model or "SmolLM2-135M-Instruct").name
    measured = {base_name: measure(model, tokenizer, tasks, text, args, base_name)}
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
        name = f"{base_name} with {Path(args.adapter).name}"
        measured[name] = measure(model, tokenizer, tasks, text, args, name)
    report(measured, output_dir)


def check(args: Arguments, text: str) -> None:
    """Raise for what would fail only after the model was loaded."""
    known = {*NEEDLES, "key_values", "facts"}
    if unknown := set(args.tasks) - known:
        raise ValueError(f"--tasks names {sorted(unknown)}; choose among {sorted(known)}.")
    if NEEDLES.keys() & set(args.tasks) and not text.strip():
        raise ValueError(
            f"--tasks {' '.join(args.tasks)} hides numbers in your text, but --documents "
            f"{' '.join(args.documents) or 'was not given'} holds none. Name files of text."
        )


def make_tasks(args: Arguments, text: str, tokenizer) -> list[tuple[Task, list[int]]]:
    """Tasks with the lengths to run them at."""
    tasks: list[tuple[Task, list[int]]] = [
        (Needles(text, tokenizer, NEEDLES[name]), args.lengths) for name in args.tasks if name in NEEDLES
    ]
    if "key_values" in args.tasks or args.key_value_file:
        tasks.append((KeyValues(file=args.key_value_file), args.items))
    if "facts" in args.tasks:
        tasks.append((Facts(), args.items))
    if args.question_file:
        tasks.append((MultiDocument(args.question_file), args.passages))
    tasks += [(Exam(file, tokenizer), args.lengths) for file in args.exam_files]
    return tasks


@dataclass
class Measured:
    """Results of one model, and what it loses on the documents (None without enough text)."""

    results: list[Result]
    losses: PositionLosses | None
    perplexity: float | None


def measure(model, tokenizer, tasks, text: str, args: Arguments, name: str) -> Measured:
    options = {"positions": tuple(args.positions), "num_groups": args.questions, "seed": args.seed, "name": name}
    results = [evaluate(model, tokenizer, task, lengths=lengths, **options) for task, lengths in tasks]
    if len(tokenizer(text, verbose=False)["input_ids"]) <= args.chunk_length:
        return Measured(results, None, None)
    chunks = {"chunk_length": args.chunk_length, "max_chunks": 16}
    return Measured(
        results,
        losses_by_position(model, tokenizer, text, **chunks),
        perplexity(model, tokenizer, text, **chunks),
    )


def report(measured: dict[str, Measured], output_dir: Path) -> None:
    """Print the table, write scores and pictures."""
    first, *others = measured.values()
    for index, result in enumerate(first.results):
        rivals = [other.results[index] for other in others]
        print_table([result, *rivals])
        name = "".join(char if char.isalnum() else "_" for char in result.task)
        for number, one in enumerate([result, *rivals]):
            one.save(output_dir / f"{name}_{number}.json")
            one.plot().savefig(output_dir / f"{name}_{number}.png", dpi=150)
        if rivals:
            result.plot(rivals).savefig(output_dir / f"{name}.png", dpi=150)
    losses = {name: one.losses for name, one in measured.items() if one.losses is not None}
    if losses:
        plot_losses(losses, title="your documents").savefig(output_dir / "losses.png", dpi=150)
        (output_dir / "losses.json").write_text(
            json.dumps({name: asdict(curve) for name, curve in losses.items()}, indent=2) + "\n"
        )
        for name, one in measured.items():
            print(f"perplexity of your documents, {name}: {one.perplexity:.3f}")
    print(f"\nScores and pictures are in {output_dir}.")


def print_table(results: list[Result]) -> None:
    """Scores with 95% intervals, by length and position."""
    positions = results[0].positions or [None]
    print(f"\n{results[0].task}")
    for length in results[0].lengths:
        heads = ["all" if position is None else f"{position:.0%}" for position in positions]
        print(f"{length:>9,} {results[0].unit:<20}" + "".join(f"{head:>18}" for head in [*heads, "mean"]))
        for result in results:
            cells = []
            for position in [*positions, None]:
                low, high = result.interval(length=length, position=position)
                cells.append(f"{result.mean(length=length, position=position):.2f} ({low:.2f} to {high:.2f})")
            print(f"  {result.model[:28]:<28}" + "".join(f"{cell:>20}"[2:] for cell in cells))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
