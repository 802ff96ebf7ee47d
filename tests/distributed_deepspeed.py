"""Two steps under DeepSpeed's ZeRO stages, launched in several processes by `test_distributed.py`.

Usage: `DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 distributed_deepspeed.py MODEL OUTPUT`

Without accelerate, which offers DeepSpeed for accelerators only.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from test_trainer import SGD, adapted, padded, rows


def main(model_folder: str, output: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for stage in (2, 3):
        model = adapted(model_folder)
        train(model, stage, Path(output, f"zero{stage}"))
    dist.destroy_process_group()


def train(model: torch.nn.Module, stage: int, folder: Path) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=SGD["learning_rate"])
    config = {
        "train_micro_batch_size_per_gpu": 4,
        # Shard the smallest parameters, too; without a threshold, stage 3 would leave routers whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model.train(), optimizer=optimizer, config=config)
    for step in range(2):
        sequences = rows()[8 * step : 8 * step + 8]
        num_items = padded(sequences)["labels"][:, 1:].ne(-100).sum()
        batch = padded(sequences[dist.get_rank() :: dist.get_world_size()])
        # The gradients of the processes are averaged.
        engine.backward(engine(**batch, num_items_in_batch=num_items).loss * dist.get_world_size())
        engine.step()
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
