"""Saves one of two states of a model again and again to the same folder, until it is killed: `FOLDER KIND`.

The two differ in their weights. Says on a line of its own when it begins.
"""

import itertools
import sys
from pathlib import Path

import torch
from tiny_models import adapted_model, decide, save_tiny_model
from transformers.utils import logging


def states(folder: Path, kind: str) -> list:
    """Two models, `kind` "adapter" or "merged", that are saved to `folder`/0 and `folder`/1."""
    logging.disable_progress_bar()
    models = []
    for seed in (0, 1):
        model = adapted_model(save_tiny_model(folder / "base"))
        decide(model, seed=seed)
        models.append(model if kind == "adapter" else model.merge_and_unload())
        models[-1].save_pretrained(folder / str(seed))
    return models


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, kind = Path(sys.argv[1]), sys.argv[2]
    models = states(target, kind)
    models[0].save_pretrained(target / "saved")
    print("saving", flush=True)
    for model in itertools.cycle(models):
        model.save_pretrained(target / "saved")
