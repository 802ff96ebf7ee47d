"""The table and the picture of docs/experiments.md from the lines that compare.py wrote.

python docs/experiments/table.py docs/experiments/runs.jsonl docs/images/tradeoff.png
"""

import json
import sys
from pathlib import Path

from peft_moice.plotting import plot_tradeoff

NAMES = {
    "base": "base model",
    "routers": "routers: five angles",
    "routers_heads": "routers per head, R = 16: five angles",
    "routers_temperatures": "routers: five temperatures",
    "routers_both": "routers: angles and temperatures",
    "routers_both_heads": "routers per head, R = 16: angles and temperatures",
    "static": "static gates: five angles",
    "static_temperatures": "static gates: five temperatures",
    "static_both": "static gates: angles and temperatures",
    "scales": "query scale per head",
    "scales_by_token": "query scale per head and token",
    "routers_and_scales_by_token": "routers and query scale per token",
    "lora_q": "LoRA r = 1 on q_proj",
    "lora_q_equal": "LoRA r = 1 on q_proj, layers 12 to 29",
    "lora_r8": "LoRA r = 8 on attention",
}
WORST = 0.06
"""Runs that raise the perplexity by more are in the table and left out of the picture."""


def main(runs_file: Path, picture: Path) -> None:
    runs = [json.loads(line) for line in runs_file.read_text().splitlines()]
    base = next(run for run in runs if run["method"] == "base")
    print("| method | rate | parameters | training loss | JSON | NQ tokens | NQ loss | 60 codes | perplexity |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: ([*NAMES].index(run["method"]), run["rate"], run["seed"])):
        loss = "" if run["loss_last_10"] is None else f"{run['loss_last_10']:.2f}"
        change = "" if run is base else f" ({change_of(run, base):+.1%})"
        by_position = " ".join(f"{share:.2f}" for share in run["codes60"]["right"])
        cells = [
            NAMES[run["method"]],
            f"{run['rate']:g}" if run["rate"] else "",
            f"{run['parameters']:,}" if run["parameters"] else "",
            loss,
            f"{run['json']['right_mean']:.2f} / {run['json']['loss_mean']:.2f}",
            f"{run['nq']['tokens_mean']:.2f}",
            f"{run['nq']['loss_mean']:.2f}",
            by_position,
            f"{run['perplexity']:.2f}{change}",
        ]
        print("| " + " | ".join(cells) + " |")
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in sorted(runs, key=lambda run: run["rate"]):
        if run is not base and change_of(run, base) < WORST:
            curves.setdefault(NAMES[run["method"]], []).append((change_of(run, base), -run["nq"]["loss_mean"]))
    figure = plot_tradeoff(
        curves,
        (0.0, -base["nq"]["loss_mean"]),
        repair="log-likelihood of NQ answers",
        title="SmolLM2-135M-Instruct after 40 steps on other forms",
    )
    figure.savefig(picture, dpi=150)


def change_of(run: dict, base: dict) -> float:
    return run["perplexity"] / base["perplexity"] - 1


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
