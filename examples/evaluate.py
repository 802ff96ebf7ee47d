"""Does a model find what stands in a long prompt, wherever it stands? And does an adapter repair it?

The calls behind `peft-moice measure`, which has more tasks and options: draws lists of facts, or hides numbers in your
own text, asks for them at every position, and prints and draws the share of right answers.

    python examples/evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter outputs/routers \
        --documents notes/*.txt --lengths 512 1024
"""

from dataclasses import dataclass, field
from pathlib import Path

from loading import load_model
from peft import PeftModel
from transformers import HfArgumentParser

from peft_moice.evaluation import Facts, Needles, evaluate
from peft_moice.training.data import read_text


@dataclass
class Arguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of an adapter, measured beside it."})
    documents: list[str] = field(default_factory=list, metadata={"help": "Files of your own text. Default: facts."})
    lengths: list[int] = field(
        default_factory=lambda: [16, 30], metadata={"help": "Facts, or tokens of text, in a prompt."}
    )
    questions: int = field(default=16, metadata={"help": "Questions at each position and length."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder for scores and picture."})


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(read_text(file) for file in args.documents)
    model, tokenizer = load_model(args.model)
    task = Needles(text, tokenizer) if args.documents else Facts()

    results = [evaluate(model, tokenizer, task, lengths=args.lengths, num_groups=args.questions, name="base model")]
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
        name = Path(args.adapter).name
        results.append(evaluate(model, tokenizer, task, lengths=args.lengths, num_groups=args.questions, name=name))

    for result in results:
        for length, row in zip(result.lengths, result.table(), strict=True):
            scores = ", ".join(f"{score:.2f} at {at:.0%}" for at, score in zip(result.positions, row, strict=True))
            print(f"{result.model}, {length:,} {result.unit}: {scores}")
        result.save(output_dir / f"{result.model.replace(' ', '_')}.json")
    results[0].plot(results[1:]).savefig(output_dir / "positions.png", dpi=150)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
