"""Train MoICE routers on your own data, with transformers' Trainer: on a CPU, on one GPU or on many.

Data (`--train_files`, and `--eval_files` in the same format):

- `--data_format messages`: JSON lines `{"messages": [{"role": "user", "content": ...}, ...]}`
- `--data_format prompt_answer`: JSON lines `{"prompt": ..., "answer": ...}`
- `--data_format text`: plain text, cut into sequences of `--max_length` tokens
- `--data_format documents`: plain text that retrieval data is made of, without labels. A prompt shows several passages
  and asks to repeat sentences of some of them by their first words; every place is asked for equally often.

Chats go through the tokenizer's chat template (or `--chat_template`); without one, turns are joined by newlines.

    accelerate launch --num_processes 8 examples/train_router.py --preset paper --output_dir outputs/paper \
        --model meta-llama/Llama-2-7b-chat-hf --data_format messages --train_files chats.jsonl
    python examples/train_router.py --preset retrieval --output_dir outputs/retrieval \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --train_files notes/*.txt

A preset fills in defaults (see `PRESETS`) that any argument overrides; every argument of `TrainingArguments` is one.
`--resume_from_checkpoint last` goes on from the last checkpoint in `--output_dir`, or starts where there is none. At
the end `--output_dir` holds the adapter and its model card, with losses on `--eval_files` with and without routers.
How data becomes sequences is in `router_data.py`.
"""

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from keeping import distance_from_base
from loading import read_text
from peft import get_peft_model
from router_data import Collator, DataArguments, load_examples
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_moice import MoICEConfig, write_model_card

logger = logging.getLogger("train_router")

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    # What the authors released for Llama-2-7B-chat (https://github.com/p1nksnow/MoICE); the routers' own settings are
    # MoICEConfig's defaults.
    "paper": {
        "loss_on": "all",
        "max_length": 4608,
        "sequences_per_step": 128,
        "max_steps": 7,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "aux_coef": 0.3,
        "dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_steps": 1,
    },
    # The recipe of repair_lost_in_the_middle.py, which was measured on its lists of facts, for passages.
    "retrieval": {
        "data_format": "documents",
        "loss_on": "answers",
        "angles": [1.0, 0.25, 0.5, 2.0, 4.0],
        "init": "identity",
        "aux_coef": 0.0,
        "questions": 4,
        "keep_weight": 2.0,
        "max_steps": 40,
        "per_device_train_batch_size": 1,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "logging_steps": 1,
    },
}


@dataclass
class Arguments:
    """Model, routers and loss; data is in DataArguments, the rest in transformers' TrainingArguments."""

    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    preset: Literal["paper", "retrieval"] | None = field(default=None, metadata={"help": "Recipe for the defaults."})
    sequences_per_step: int | None = field(
        default=None, metadata={"help": "Batch over all devices; sets gradient_accumulation_steps."}
    )
    angles: list[float] | None = field(
        default=None, metadata={"help": "Base angles as multiples of the model's own, which comes first."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Angles mixed per head and token. Default: all."})
    router_scope: Literal["layer", "head"] = field(default="layer", metadata={"help": "What shares a router."})
    init: Literal["identity", "normal"] = field(
        default="normal", metadata={"help": "Start at the model's own angle, or near the equal mixture of all."}
    )
    aux_coef: float = field(default=0.3, metadata={"help": "Weight of the balance loss."})
    keep_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance (KL) from the base model on ordinary text; 0: none."}
    )
    keep_files: list[str] = field(
        default_factory=list, metadata={"help": "Ordinary text. Default: train_files, where these are plain text."}
    )
    keep_tokens: int = field(default=256, metadata={"help": "Tokens of ordinary text in a step of a device."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model: auto, float32, bfloat16, float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of the base model. Default: its own."})


def parse_arguments(argv: list[str]) -> tuple[Arguments, DataArguments, TrainingArguments]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=[name for name in PRESETS if name])
    parser = HfArgumentParser((Arguments, DataArguments, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(remove_unused_columns=False, **PRESETS[first.parse_known_args(argv)[0].preset])
    args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    if args.sequences_per_step is not None:
        per_pass = training_args.train_batch_size * training_args.world_size
        if training_args.gradient_accumulation_steps != 1 or args.sequences_per_step % per_pass:
            raise ValueError(
                f"--sequences_per_step {args.sequences_per_step} has to be a multiple of the {per_pass} sequences "
                "that the devices read at once, and excludes --gradient_accumulation_steps."
            )
        training_args.gradient_accumulation_steps = args.sequences_per_step // per_pass
    return args, data_args, training_args


def main(args: Arguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    logging.basicConfig(level=logging.INFO if training_args.process_index == 0 else logging.WARNING)
    set_seed(training_args.seed)
    quiet = training_args.process_index > 0
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if data_args.chat_template is not None:
        tokenizer.chat_template = read_text(data_args.chat_template)
    # Whatever is wrong with the data shows before a large model is loaded.
    train_examples = load_examples(data_args.train_files, tokenizer, data_args, training_args.seed, quiet)
    eval_examples = load_examples(data_args.eval_files, tokenizer, data_args, training_args.seed + 1, quiet)
    keep_ids = ordinary_text(args, data_args, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    config = MoICEConfig(
        task_type="CAUSAL_LM",
        base_multipliers=args.angles,
        top_k=args.top_k,
        router_scope=args.router_scope,
        init_weights="identity" if args.init == "identity" else True,
        router_aux_loss_coef=args.aux_coef,
    )
    trainer = RouterTrainer(
        arguments=args,
        data_arguments=data_args,
        keep_ids=keep_ids,
        model=get_peft_model(model, config),
        args=training_args,
        train_dataset=train_examples,
        eval_dataset=eval_examples or None,
        data_collator=Collator(tokenizer),
        processing_class=tokenizer,
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_examples:
        with trainer.model.disable_adapter():
            base = trainer.evaluate(metric_key_prefix="eval_base")["eval_base_loss"]
        trainer.losses = [{"model": "base", "loss": base}, {"model": "MoICE", "loss": trainer.evaluate()["eval_loss"]}]
    trainer.save_model()
    trainer.create_model_card()


def ordinary_text(args: Arguments, data_args: DataArguments, tokenizer) -> torch.Tensor | None:
    """Token ids of the text on which the adapted model is kept near the base model; None if it is not.

    Raises:
        ValueError: there is too little of it.
    """
    if args.keep_weight == 0:
        return None
    files = args.keep_files
    if not files and data_args.data_format in ("text", "documents"):
        files = data_args.train_files
    text = "\n\n".join(read_text(file) for file in files)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(ids) <= args.keep_tokens:
        raise ValueError(
            f"--keep_weight {args.keep_weight} needs more than {args.keep_tokens} tokens of ordinary text, but "
            f"{files or 'no file'} gives {len(ids)}. Name text with --keep_files."
        )
    return ids


class RouterTrainer(Trainer):
    """Writes MoICE's model card, and can add the distance from the base model on ordinary text to the loss."""

    def __init__(
        self, *, arguments: Arguments, data_arguments: DataArguments, keep_ids: torch.Tensor | None, **kwargs
    ):
        super().__init__(**kwargs)
        self.arguments, self.data_arguments, self.keep_ids = arguments, data_arguments, keep_ids
        self.losses: list[dict] | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.arguments.keep_weight == 0 or not model.training:
            return result
        adapted = self.accelerator.unwrap_model(model)
        distance = distance_from_base(model, adapted, self.keep_ids, self.arguments.keep_tokens)
        if num_items_in_batch is not None:  # then Trainer adds the losses of micro-batches up as they are
            distance = distance / self.current_gradient_accumulation_steps
        loss = (result[0] if return_outputs else result) + self.arguments.keep_weight * distance
        return (loss, result[1]) if return_outputs else loss

    def create_model_card(self, *args, **kwargs) -> None:
        """Called here at the end, and by Trainer before it pushes to the Hub."""
        if not self.is_world_process_zero():
            return
        ours, data, trainers = self.arguments, self.data_arguments, self.args
        recipe = {
            "Preset": ours.preset or "none",
            "Data": f"{data.data_format}: {', '.join(Path(file).name for file in data.train_files)}",
            "Rows": f"{len(self.train_dataset):,} of up to {data.max_length:,} tokens{', packed' * data.packing}",
            "Loss on": "all" if data.data_format == "text" else data.loss_on,
            "Steps": self.state.global_step,
            "Rows per step": trainers.train_batch_size * trainers.gradient_accumulation_steps * trainers.world_size,
            "Learning rate": f"{trainers.learning_rate:g}, {trainers.lr_scheduler_type.value}",
            "Weight decay": trainers.weight_decay,
            "Weight of the balance loss": ours.aux_coef,
            "Weight of the distance from the base model": ours.keep_weight,
            "Start": ours.init,
            "Seed": trainers.seed,
        }
        write_model_card(
            self.accelerator.unwrap_model(self.model),
            trainers.output_dir,
            repo_id=self.hub_model_id if trainers.push_to_hub else None,
            recipe=recipe,
            evaluation=self.losses,
        )


if __name__ == "__main__":
    main(*parse_arguments(sys.argv[1:]))
