"""A small model trained from nothing with and without routers: examples/train_from_scratch.py.

The paper's size, data and figures are in none of the sources at hand; this is the example's size, 0.9 million
parameters, and its text, Python's standard library.
"""

import json
from pathlib import Path
from typing import Any

import train_from_scratch

COLUMNS = ["within the training length", "beyond it"]


def run(folder: Path, *, seeds: list[int], small: bool, **overrides: Any) -> dict[str, dict[str, list[float | None]]]:
    """Loss in nats per byte, by model and column: mean, and for the difference its 95% interval.

    Args:
        folder: for the model with routers, and all results by position.
        seeds: both models are trained for each.
        small: three steps of a smaller model.
        overrides: of the example's arguments.
    """
    size = {"hidden_size": 64, "layers": 2, "heads": 2, "length": 128, "steps": 3, "eval_windows": 4} if small else {}
    args = train_from_scratch.Arguments(output_dir=str(folder), seeds=seeds, **{**size, **overrides})
    train_from_scratch.main(args)
    results = json.loads((folder / "results.json").read_text())
    values: dict[str, dict[str, list[float | None]]] = {}
    half = args.buckets // 2
    for name, method in (("without", "base"), ("with", "moice")):
        runs = [run for run in results["runs"] if run["routers"] == name]
        within = sum(run["loss_within_length"] for run in runs) / len(runs)
        beyond = sum(sum(run["loss_by_position"][half:]) for run in runs) / len(runs) / half
        values[method] = {column: [mean, None, None] for column, mean in zip(COLUMNS, (within, beyond), strict=True)}
    mean, error = results["difference"]["within_length"]
    values["moice - base"] = {COLUMNS[0]: [mean, mean - 1.96 * error, mean + 1.96 * error]}
    return values
