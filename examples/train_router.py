"""Train MoICE routers on your own chats, with transformers' Trainer: a script to start your own from.

The calls behind `peft-moice train --preset chats`, which has more formats, presets and options. Data are chats as JSON
lines, `{"messages": [{"role": "user", "content": ...}, ...]}`, or in another format that
`peft_moice.training.data` knows.

    python examples/train_router.py --model HuggingFaceTB/SmolLM2-135M-Instruct --train_files examples/data/facts.jsonl
    accelerate launch --num_processes 8 examples/train_router.py --model ... --train_files ...
"""

import logging
from dataclasses import dataclass, field

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from peft_moice import BalanceLossMixin, KeepCloseMixin, MoICEConfig, write_model_card
from peft_moice.training.callback import MoICECallback
from peft_moice.training.data import DataArguments, load_examples, make_collator, plain_text, read_text


@dataclass
class Arguments:
    """Model and routers; data is in DataArguments, the rest in transformers' TrainingArguments."""

    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    angles: list[float] = field(
        default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 4.0], metadata={"help": "Multiples of the model's own."}
    )
    keep_weight: float = field(default=2.0, metadata={"help": "Weight of the divergence from the base model."})
    keep_tokens: int = field(default=256, metadata={"help": "Tokens of text that it is taken on."})


class RouterTrainer(KeepCloseMixin, BalanceLossMixin, Trainer):
    """Keeps the model near its base where nothing is to be repaired, and logs each part of the loss."""


def main(args: Arguments, data: DataArguments, training: TrainingArguments) -> None:
    logging.basicConfig(level=logging.INFO)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if data.chat_template is not None:
        tokenizer.chat_template = read_text(data.chat_template)
    examples = load_examples(data.train_files, tokenizer, data)
    eval_examples = load_examples(data.eval_files, tokenizer, data)

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    config = MoICEConfig(
        task_type="CAUSAL_LM", base_multipliers=args.angles, init_weights="identity", router_aux_loss_coef=0.0
    )
    model = get_peft_model(base, config)
    trainer = RouterTrainer(
        model=model,
        args=training,
        train_dataset=examples,
        eval_dataset=eval_examples or None,
        data_collator=make_collator(tokenizer, data.packing),
        processing_class=tokenizer,
        keep_text=plain_text(data.train_files, data.data_format, data.columns),
        keep_weight=args.keep_weight,
        keep_tokens=args.keep_tokens,
    )
    trainer.add_callback(MoICECallback(trainer))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if eval_examples:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_model_card(trainer.accelerator.unwrap_model(trainer.model), training.output_dir)


if __name__ == "__main__":
    parser = HfArgumentParser((Arguments, DataArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/routers",
        learning_rate=5e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        logging_steps=1,
        remove_unused_columns=False,
    )
    main(*parser.parse_args_into_dataclasses())
