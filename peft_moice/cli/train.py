"""`peft-moice train`: routers on one's own data, with transformers' Trainer."""

import argparse
import errno
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, sort_checkpoints
from transformers.utils import CONFIG_NAME

from ..hub.push import write_model_card
from ..training import BalanceLossMixin, KeepCloseMixin
from ..training.callback import MoICECallback
from ..training.data import DataArguments, load_examples, make_collator, plain_text, read_text
from ..training.keep_close import check_enough_text, text_ids
from ..training.loss_parts import DivergedError
from ..tuner.config import MoICEConfig
from .interrupts import StopOnSignal
from .models import Dtype, ModelArguments, check_folder, load_tokenizer
from .pace import TellPace
from .parsing import Outcome, Parser, UsageError, option, output_folder
from .presets import PRESETS

logger = logging.getLogger(__name__)

SUMMARY = "train routers, and nothing else, on chats, prompts with answers, text, or questions about your documents"

_EPILOG = """formats (--data_format; auto tells them by their columns, and takes .txt and .md for text)
  messages         {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
  sharegpt         {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
  prompt_answer    {"prompt": ..., "answer": ...}; "completion" or "response" in place of "answer"
  question_answer  {"question": ..., "context": ..., "answers": ...}; context and answers may be lists
  alpaca           {"instruction": ..., "input": ..., "output": ...}
  text             plain text, learned whole, in sequences of --max_length tokens
  documents        plain text, in which invented facts are hidden and asked for: "What is the access code of ...?"
  Files are JSON lines, a JSON array, CSV (all also .gz) or parquet. OWNER/NAME[:SPLIT] is a data set of the Hub.
presets (--preset; any argument overrides them)
  retrieval      documents, 24 steps; five angles, start at the base model, rate 8e-2, KL to the base model of weight 2
  chats          the same routers on any chats, one epoch, rate 5e-2; the KL is taken on what users say in them
  paper          the released recipe for 7B models: 128 sequences a step, 7 steps, rate 1e-4; hardly moves small models
Every argument of transformers' TrainingArguments is one (--max_steps, --learning_rate, ...; --help_all lists them).
--resume_from_checkpoint last goes on from the last checkpoint in --output_dir. Ctrl-C loses nothing.
examples
  peft-moice train --preset chats --model HuggingFaceTB/SmolLM2-135M-Instruct --train_files chats.jsonl
  accelerate launch -m peft_moice train --preset paper --model meta-llama/Llama-2-7b-chat-hf --train_files my.jsonl"""


_TEXTS = {
    "usage": "--model MODEL --train_files FILE ... [--preset NAME] [options] [--json]",
    "summary": SUMMARY,
    "epilog": _EPILOG,
}


@dataclass
class Arguments(ModelArguments):
    """Model, routers and loss; data is in DataArguments, the rest in transformers' TrainingArguments."""

    model: str = option("Folder or Hub id of the base model.")
    preset: Literal["retrieval", "chats", "paper"] | None = option("Recipe for the defaults, see below.", None)
    angles: list[float] | None = option("Base angles as multiples of the model's own, which comes first.", None)
    top_k: int | None = option("Angles mixed per head and token. Default: all.", None)
    router_scope: Literal["layer", "head"] = option("What shares a router.", "layer")
    init: Literal["identity", "normal"] = option(
        "Start as the base model, or near the equal mixture of all angles.", "normal"
    )
    aux_coef: float = option("Weight of the balance loss.", 0.3)
    keep_weight: float = option("Weight of the divergence (KL) from the base model on ordinary text; 0: none.", 0.0)
    keep_files: list[str] = option("Ordinary text. Default: --train_files, without the answers.", [])
    keep_tokens: int = option("Tokens of ordinary text in a micro-batch.", 256)
    sequences_per_step: int | None = option("Batch over all devices; sets gradient_accumulation_steps.", None)
    dtype: Dtype = option("Of the base model: auto, float32, bfloat16, float16.", "auto")
    attn_implementation: str | None = option("Of the base model. Default: its own.", None)
    overwrite: bool = option("Replace the adapter and checkpoints in --output_dir.", False)


@dataclass
class TrainArguments:
    """All arguments of the command."""

    ours: Arguments
    data: DataArguments
    trainer: TrainingArguments


def parser() -> Parser:
    """Of all arguments."""
    return _AllArguments("train", (Arguments, DataArguments, TrainingArguments), **_TEXTS)


def short_parser() -> Parser:
    """Of the arguments that `--help` shows."""
    parser = Parser("train", (Arguments, DataArguments), **_TEXTS)
    parser.add_argument("--output_dir", default="outputs/routers", help="Folder for adapter and card.")
    return parser


class _AllArguments(Parser):
    """Knows presets, which are defaults."""

    def parse(self, argv: Sequence[str]) -> TrainArguments:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset")
        first.add_argument("--num_train_epochs", "--num-train-epochs")
        known, _ = first.parse_known_args(argv)
        # A wrong name is left to the whole parser, which lists the right ones.
        preset = dict(PRESETS.get(known.preset, {}))
        if known.num_train_epochs is not None:
            preset.pop("max_steps", None)  # it would win
        if asked := {"-h", "--help", "--help_all"} & {*argv}:
            shown = self if "--help_all" in asked else short_parser()
            shown.set_defaults(**preset)
            shown.print_help()
            raise SystemExit(0)
        self.set_defaults(output_dir="outputs/routers", remove_unused_columns=False, **preset)
        ours, data, trainer = super().parse(argv)
        _settle(ours, trainer)
        return TrainArguments(ours, data, trainer)


def _settle(ours: Arguments, trainer: TrainingArguments) -> None:
    """What one of them means for the other."""
    if ours.load_in_4bit and trainer.device.type == "cpu" and trainer.eval_strategy != "no":
        raise UsageError(
            "--eval_strategy: on a CPU, bitsandbytes' layers of 4 bit give wrong gradients once they have run in an "
            "evaluation. Leave it out; --eval_files are measured at the end."
        )
    if ours.sequences_per_step is None:
        return
    per_pass = trainer.train_batch_size * trainer.world_size
    if trainer.gradient_accumulation_steps != 1 or ours.sequences_per_step % per_pass:
        raise UsageError(
            f"--sequences_per_step {ours.sequences_per_step} has to be a multiple of the {per_pass} sequences that "
            "the devices read at once, and excludes --gradient_accumulation_steps."
        )
    trainer.gradient_accumulation_steps = ours.sequences_per_step // per_pass


def run(args: TrainArguments) -> Outcome:
    """Check the data, load the model, train, save."""
    ours, data, training = args.ours, args.data, args.trainer
    quiet = training.process_index > 0
    if quiet:
        logging.getLogger("peft_moice").setLevel(logging.WARNING)
    elif ours.preset is None:
        logger.warning(
            "No --preset: what is not set has the defaults of MoICEConfig, the released recipe, and of Trainer, with "
            "which small models barely move. --preset retrieval (your documents) and --preset chats (your chats) are "
            "recipes that do."
        )
    set_seed(training.seed)
    config, quantization = make_config(ours), ours.quantization()
    check_folder(ours.model, "--model", CONFIG_NAME, ADAPTER_CONFIG_NAME)
    checkpoint = checkpoint_of(args)
    tokenizer = load_tokenizer(ours.model)
    if data.chat_template is not None:
        tokenizer.chat_template = read_text(data.chat_template)
    # Whatever is wrong with the data shows before a large model is loaded.
    train_examples = load_examples(data.train_files, tokenizer, data, training.seed, quiet)
    eval_examples = load_examples(data.eval_files, tokenizer, data, training.seed + 1, quiet)
    keep_ids = ordinary_text(args, tokenizer)
    tokens = sum(len(sequence["input_ids"]) for row in train_examples for sequence in row)
    sequences = sum(map(len, train_examples))
    logger.info("%s sequences of %s tokens in the mean.", f"{sequences:,}", f"{tokens / sequences:,.0f}")
    folder = output_folder(str(training.output_dir))
    options = {"attn_implementation": ours.attn_implementation, "quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(ours.model, dtype=ours.dtype, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"{ours.model} holds an adapter, without which the routers would be saved. Name the base model alone "
            f"({model.name_or_path}); merge LoRA into it first. --resume_from_checkpoint goes on with a training."
        )
    adapted = get_peft_model(model, config)
    if checkpoint is not None and Path(checkpoint, ADAPTER_CONFIG_NAME).is_file():
        check_same_routers(checkpoint, config)
    try:
        trainer = RouterTrainer(
            recipe=args,
            keep_text=keep_ids,
            keep_weight=ours.keep_weight,
            keep_tokens=ours.keep_tokens,
            model=adapted,
            args=training,
            train_dataset=train_examples,
            eval_dataset=eval_examples or None,
            data_collator=make_collator(tokenizer, data.packing),
            processing_class=tokenizer,
        )
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        raise UsageError(f"--report_to {' '.join(training.report_to or [])}: {error}") from error
    if checkpoint is None and not quiet:
        for obsolete in sort_checkpoints(str(folder)):
            shutil.rmtree(obsolete)
    return train(trainer, checkpoint)


def checkpoint_of(args: TrainArguments) -> str | None:
    """Where to resume from; None to train from the start, if that mixes with nothing that another has left."""
    folder, checkpoint = str(args.trainer.output_dir), args.trainer.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise UsageError(
                f"--resume_from_checkpoint last: there is no checkpoint in {folder}. Leave it out to train anew."
            )
    if checkpoint is None and not args.ours.overwrite:
        left = [Path(folder, ADAPTER_CONFIG_NAME), *map(Path, sort_checkpoints(folder))]
        if found := [path.name for path in left if path.exists()]:
            raise UsageError(
                f"--output_dir {folder} holds {', '.join(found)} of another training. Name another folder; "
                "--resume_from_checkpoint last goes on from its last checkpoint; --overwrite replaces all of them."
            )
    return checkpoint


def last_checkpoint(folder: str) -> str | None:
    """The whole checkpoint that was written last. Another training in the folder may have left higher numbers."""
    paths = sort_checkpoints(folder, use_mtime=True)
    return next((path for path in reversed(paths) if Path(path, TRAINER_STATE_NAME).is_file()), None)


def check_same_routers(checkpoint: str, config: MoICEConfig) -> None:
    """Weights of one mixture fit another of as many angles, and would mean something else there."""
    saved = MoICEConfig.from_pretrained(checkpoint)
    for name in ("rope_bases", "top_k", "router_dim", "router_scope", "hidden_act", "init_weights"):
        was, now = getattr(saved, name), getattr(config, name)
        if was != now:
            raise UsageError(
                f"the routers in {checkpoint} have the {name} {was}, and these arguments ask for {now}. Resume with "
                "the arguments that it was trained with, or train anew in another --output_dir."
            )


def make_config(ours: Arguments) -> MoICEConfig:
    """What the routers are."""
    return MoICEConfig(
        task_type="CAUSAL_LM",
        base_multipliers=ours.angles,
        top_k=ours.top_k,
        router_scope=ours.router_scope,
        init_weights="identity" if ours.init == "identity" else True,
        router_aux_loss_coef=ours.aux_coef,
    )


def ordinary_text(args: TrainArguments, tokenizer: Any) -> torch.Tensor | None:
    """Token ids of the text on which the adapted model is kept near the base model; None if it is not."""
    if args.ours.keep_weight == 0:
        return None
    files = args.ours.keep_files
    text = plain_text(files) if files else plain_text(args.data.train_files, args.data.data_format, args.data.columns)
    ids = text_ids(text, tokenizer)
    try:
        check_enough_text(ids, args.ours.keep_weight, args.ours.keep_tokens)
    except ValueError as error:
        raise UsageError(f"{', '.join(files or args.data.train_files)}: {error} --keep_files names text.") from None
    return ids


def train(trainer: "RouterTrainer", checkpoint: str | None) -> Outcome:
    """Train to the end or to a signal, measure, save."""
    stop = StopOnSignal(trainer)
    trainer.add_callback(MoICECallback(trainer))
    trainer.add_callback(TellPace())
    trainer.add_callback(stop)
    trainer.add_callback(RaiseIfDone())
    interrupted = False
    with telling_of_a_full_disk(trainer):
        with stop.listening():
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except KeyboardInterrupt:
                interrupted = True
            except DivergedError as error:
                raise UsageError(
                    f"the training diverged. {error} --learning_rate, which is {trainer.args.learning_rate:g}, says "
                    "how large steps are."
                ) from error
            except NothingToDo:
                return _outcome(trainer, interrupted=False, is_done_before=True)
        interrupted = interrupted or stop.stopped
        if trainer.eval_dataset is not None and not interrupted:
            adapted: Any = trainer.model
            with adapted.disable_adapter():
                base = trainer.evaluate(metric_key_prefix="eval_base")["eval_base_loss"]
            moice = trainer.evaluate()["eval_loss"]
            trainer.losses = [{"model": "base", "loss": base}, {"model": "MoICE", "loss": moice}]
        trainer.save_model()
        trainer.create_model_card()
    return _outcome(trainer, interrupted)


@contextmanager
def telling_of_a_full_disk(trainer: Trainer) -> Iterator[None]:
    """Raise a UsageError for what Python, PyTorch and safetensors raise where a file cannot be written whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not is_full and not re.search(
            r"unexpected pos|iostream error|PytorchStreamWriter|os error (28|122|27)\b", str(error)
        ):
            raise
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()
        folder = str(trainer.args.output_dir)
        whole = last_checkpoint(folder)
        raise UsageError(
            f"the disk of {folder} is full, or a quota used up ({error}). Make room, then "
            + (f"--resume_from_checkpoint last goes on from {whole}." if whole else "train again with --overwrite.")
        ) from error


class NothingToDo(Exception):
    """A training that is resumed has done all of its steps."""


class RaiseIfDone(TrainerCallback):
    """Raises NothingToDo, because Trainer would do one step more."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise NothingToDo


def _outcome(trainer: "RouterTrainer", interrupted: bool, is_done_before: bool = False) -> Outcome:
    if not trainer.is_world_process_zero():
        return Outcome("", None, interrupted)
    folder, step = trainer.args.output_dir, trainer.state.global_step
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    values: dict[str, Any] = {
        "adapter": folder,
        "steps": step,
        "max_steps": trainer.state.max_steps,
        "last_log": logged[-1] if logged else None,
        "eval": trainer.losses,
    }
    lines = [f"Adapter and card are in {folder}, after {step} of {trainer.state.max_steps} steps."]
    if logged:
        lines[0] += f" Last loss: {logged[-1]['loss']:.4g}."
    if trainer.losses:
        lines.append(
            "Loss on --eval_files: " + ", ".join(f"{row['model']} {row['loss']:.4g}" for row in trainer.losses)
        )
    if is_done_before:
        lines.append(
            "There was nothing to do: all steps were done before. More --max_steps or --num_train_epochs go on."
        )
    if interrupted:
        lines.append("Interrupted: the same command with --resume_from_checkpoint last goes on.")
    lines.append(f"What it changed: peft-moice measure --adapter {folder}")
    return Outcome("\n".join(lines), values, interrupted)


class RouterTrainer(KeepCloseMixin, BalanceLossMixin, Trainer):
    """Logs each part of the loss, and writes MoICE's model card, which has the arguments, `recipe`, in it."""

    def __init__(self, *, recipe: TrainArguments, **kwargs: Any):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.losses: list[dict[str, Any]] | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Called here at the end, and by Trainer before it pushes to the Hub."""
        if not self.is_world_process_zero():
            return
        ours, data, training = self.recipe.ours, self.recipe.data, self.args
        rows: Any = self.train_dataset
        recipe = {
            "Preset": ours.preset or "none",
            "Data": f"{data.data_format}: {', '.join(Path(file).name for file in data.train_files)}",
            "Rows": f"{len(rows):,} of up to {data.max_length:,} tokens{', packed' * data.packing}",
            "Loss on": data.loss_on if any(-100 in part["labels"] for row in rows for part in row) else "all",
            "Steps": self.state.global_step,
            "Rows per step": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
            "Learning rate": f"{training.learning_rate:g}, {SchedulerType(training.lr_scheduler_type).value}",
            "Weight decay": training.weight_decay,
            "Weight of the balance loss": ours.aux_coef,
            "Weight of the divergence from the base model": ours.keep_weight,
            "Start": ours.init,
            "Seed": training.seed,
        }
        write_model_card(
            self.accelerator.unwrap_model(self.model),
            str(training.output_dir),
            repo_id=self.hub_model_id if training.push_to_hub else None,
            recipe=recipe,
            evaluation=self.losses,
        )
