"""Two steps of Trainer on a tiny model, launched in several processes by `test_distributed.py`.

Usage: `accelerate launch ... distributed_trainer.py MODEL OUTPUT [NAME=VALUE ...]`, with TrainingArguments by name.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from test_trainer import SGD, BalancedTrainer, adapted, arguments_of, cross_entropy, padded, rows
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import Trainer, TrainingArguments

from peft_moice.training.callback import MoICECallback


def let_accelerate_shard_on_cpu(arguments: TrainingArguments) -> None:
    """Call the CPUs GPUs: accelerate offers FSDP for accelerators only, while torch shards on any device."""
    assert arguments.device.type == "cpu"
    PartialState().distributed_type = DistributedType.MULTI_GPU
    PartialState().device = torch.device("cpu")


def save(trainer: Trainer, folder: str) -> None:
    if not isinstance(trainer.model_wrapped, FullyShardedDataParallel):
        trainer.save_model(folder)
        return
    # What `save_model` does, but for moving parts to the CPU: torch crashes where they lie there already.
    with FullyShardedDataParallel.state_dict_type(
        trainer.model_wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=False)
    ):
        state = trainer.model_wrapped.state_dict()
    if trainer.args.should_save:
        trainer.model.save_pretrained(folder, state_dict=state)


def main(model_folder: str, output: str, *assignments: str) -> None:
    torch.set_num_threads(1)
    arguments = {name: json.loads(value) for name, value in (text.split("=", 1) for text in assignments)}
    model = adapted(model_folder)
    training_arguments = arguments_of(Path(output), **SGD, **arguments)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        let_accelerate_shard_on_cpu(training_arguments)
    trainer = Trainer(model, training_arguments, padded, train_dataset=rows(), eval_dataset=rows(4))
    trainer.add_callback(MoICECallback(trainer))
    trainer.train()
    save(trainer, f"{output}/adapter")
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        result = {
            "processes": trainer.accelerator.num_processes,
            "engine": str(trainer.accelerator.distributed_type),
            "eval_loss": metrics["eval_loss"],
        }
        for kind in ("loss", "moice/balance_loss"):
            result[kind] = [entry for entry in trainer.state.log_history if kind in entry]
        Path(output, "result.json").write_text(json.dumps(result))
    if not os.environ.get("ACCELERATE_USE_FSDP"):
        # The same steps with the loss computed outside the model.
        outside = BalancedTrainer(
            adapted(model_folder), training_arguments, padded, train_dataset=rows(), compute_loss_func=cross_entropy
        )
        outside.train()
        save(outside, f"{output}/outside")
    # A process that leaves while another still talks to it is aborted.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
