"""Trains what the tables compare, by the arguments of `peft-moice train`, on the same sequences in the same order."""

from collections.abc import Sequence
from typing import Any

from methods import METHODS
from transformers import Trainer, set_seed

from peft_moice.cli.train import parser
from peft_moice.training import KeepCloseMixin
from peft_moice.training.data import load_examples, make_collator
from peft_moice.training.data.sources import read_text
from peft_moice.training.keep_close import text_ids


class ClosenessTrainer(KeepCloseMixin, Trainer):
    """Of any adapter; routers add their balance loss by themselves."""


def make(name: str, model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    """What a method of examples/research/methods makes of a model.

    Args:
        name: of its file, or of one of its variants.
        model: of transformers.
        tokenizer: its own.
        options: see its file.
    """
    device = model.device
    function, defaults = METHODS[name]
    made = function(model, {**defaults, **options, "tokenizer": tokenizer})
    if not hasattr(made, "device"):
        made.device = device
    return made


def train(model: Any, tokenizer: Any, arguments: Sequence[str]) -> float | None:
    """Train a model, and save its adapter; return its loss on `--eval_files`, if there are any.

    Args:
        model: what [`make`] made.
        tokenizer: its own.
        arguments: of `peft-moice train`, without a model; `--angles` and the like are `make`'s.
    """
    args = parser().parse(["--model", "given", *arguments])
    ours, data, training = args.ours, args.data, args.trainer
    set_seed(training.seed)
    if data.chat_template is not None:
        tokenizer.chat_template = read_text(data.chat_template)
    kept = "\n\n".join(map(read_text, ours.keep_files))
    trainer = ClosenessTrainer(
        model=model,
        args=training,
        train_dataset=load_examples(data.train_files, tokenizer, data, training.seed),
        eval_dataset=load_examples(data.eval_files, tokenizer, data, training.seed) or None,
        data_collator=make_collator(tokenizer, data.packing),
        keep_text=text_ids(kept, tokenizer) if kept else None,
        keep_weight=ours.keep_weight if kept else 0.0,
        keep_tokens=ours.keep_tokens,
    )
    trainer.train()
    model.save_pretrained(str(training.output_dir))
    return trainer.evaluate()["eval_loss"] if data.eval_files else None
