"""The tables of this folder's README and the picture of docs/experiments.md, from the lines that compare.py wrote.

    python examples/research/table.py examples/research/runs.jsonl [docs/images/tradeoff.png]

Runs that differ in the seed alone share a row: the mean, and beneath the smallest and the greatest.
"""

import json
import sys
from pathlib import Path

NAMES = {
    "base": "base model",
    "routers": "routers: five angles",
    "routers_greater": "routers: five angles, none below the own",
    "routers_released": "routers: the release's seven angles, K = 4, balance loss",
    "routers_k1": "routers: five angles, K = 1",
    "routers_k2": "routers: five angles, K = 2",
    "routers_heads": "routers per head, R = 16: five angles",
    "routers_temperatures": "routers: five temperatures",
    "routers_both": "routers: angles and temperatures",
    "routers_both_heads": "routers per head, R = 16: angles and temperatures",
    "static": "static gates: five angles",
    "static_temperatures": "static gates: five temperatures",
    "static_both": "static gates: angles and temperatures",
    "score_mean": "routers that mix scores",
    "equal": "equal mixture, untrained",
    "equal_score_mean": "equal mixture of scores, untrained",
    "equal_score_greatest": "greatest score, untrained",
    "single_0.25": "0.25 times the base, untrained",
    "single_0.5": "0.5 times the base, untrained",
    "single_2": "2 times the base, untrained",
    "single_4": "4 times the base, untrained",
    "ms_poe": "Ms-PoE, untrained",
    "attention_buckets": "Attention Buckets, untrained",
    "base_per_head": "one rope base per head",
    "base_and_scale_per_head": "one rope base and query scale per head",
    "geometry_per_head": "one rope base, position and query scale per head",
    "scales": "query scale per head",
    "scales_by_token": "query scale per head and token",
    "routers_and_scales_by_token": "routers and query scale per token",
    "lora_below_routers": "routers over LoRA of equal size",
    "lora_q": "LoRA r = 1 on q_proj",
    "lora_q_equal": "LoRA of equal size",
    "lora_r8": "LoRA r = 8 on attention",
}
COLUMNS = {
    "training loss": lambda run: run["loss_last_10"],
    "JSON": lambda run: run["json"]["loss_mean"],
    "NQ tokens": lambda run: run["nq"]["tokens_mean"],
    "NQ loss": lambda run: run["nq"]["loss_mean"],
    "30 codes": lambda run: run["codes30"]["right_mean"],
    "60 codes": lambda run: run["codes60"]["right_mean"],
    "120 codes": lambda run: run["codes120"]["right_mean"],
}
USUAL = {"steps": 40, "prompts": None, "joined": 1, "keep_weight": 2.0, "frozen": False}
"""What a row does not say."""
SAID = {
    "steps": "{:,} steps",
    "prompts": "{} prompts over and over",
    "joined": "{} prompts in one",
    "keep_weight": "KL weight {:g}",
    "frozen": "each head's best alone",
}
"""What it says where a run differs."""
WORST = 0.06
"""Runs that raise the perplexity by more are in the table and left out of the picture."""
NOT_DRAWN = ("single_", "equal", "score_")
"""Methods whose names begin so are likewise left out, for room."""


def key_of(run: dict) -> tuple:
    """What runs of the same row have in common."""
    return (
        run.get("model", "SmolLM2-135M-Instruct"),
        run.get("train_on", "forms"),
        run.get("objective", "answers"),
        run["method"],
        tuple(run.get(name, usual) for name, usual in USUAL.items()) if run["rate"] else (),
        run["rate"],
    )


def rows_of(runs: list[dict]) -> dict[tuple, list[dict]]:
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        rows.setdefault(key_of(run), []).append(run)
    return rows


def show(runs: list[dict]) -> None:
    """Print the tables, one for each model and what it was trained on. Methods without a name here come last."""
    rows, order = rows_of(runs), [*NAMES]
    trained = [key[:2] for key, of_key in rows.items() if of_key[0]["rate"]]
    for model, train_on in dict.fromkeys(trained or [key[:2] for key in rows]):
        print(f"\n{model}, trained on {train_on}\n")
        print("| method | rate | seeds | parameters | " + " | ".join(COLUMNS) + " | perplexity |")
        print("|---" * (len(COLUMNS) + 5) + "|")
        base = base_of(runs, model)
        mine = [key for key in rows if key[:2] == (model, train_on) or (key[0] == model and key[3] == "base")]
        for key in sorted(mine, key=lambda key: ([*order, key[3]].index(key[3]), key[2], str(key[4]), key[5])):
            print("| " + " | ".join(cells(key, rows[key], base)) + " |")


def main(runs_file: Path, picture: Path | None = None) -> None:
    runs = [json.loads(line) for line in runs_file.read_text().splitlines()]
    show(runs)
    if picture:
        draw(runs, picture)


def draw(runs: list[dict], picture: Path) -> None:
    from pictures import plot_tradeoff

    rows = rows_of(runs)
    base = base_of(runs, "SmolLM2-135M-Instruct")
    curves: dict[str, list[tuple[float, float]]] = {}
    for key, of_key in sorted(rows.items(), key=lambda item: item[0][-1]):
        is_drawn = key[:3] == ("SmolLM2-135M-Instruct", "forms", "answers") and not key[3].startswith(NOT_DRAWN)
        is_drawn &= key[4] in ((), tuple(USUAL.values()))
        if not is_drawn or key[3] == "base":
            continue
        change = mean([change_of(run, base) for run in of_key])
        if change < WORST:
            loss = mean([run["nq"]["loss_mean"] for run in of_key])
            curves.setdefault(name_of(key), []).append((change, -loss))
    figure = plot_tradeoff(
        curves,
        (0.0, -base["nq"]["loss_mean"]),
        repair="log-likelihood of NQ answers",
        title="SmolLM2-135M-Instruct after 40 steps on other forms",
    )
    figure.savefig(picture, dpi=150)


def base_of(runs: list[dict], model: str) -> dict | None:
    return next((run for run in runs if run["method"] == "base" and key_of(run)[0] == model), None)


def name_of(key: tuple) -> str:
    _, _, objective, method, said, _ = key
    name = NAMES.get(method, method)
    for (field, usual), value in zip(USUAL.items(), said, strict=bool(said)):
        name += f", {SAID[field].format(value)}" if value != usual else ""
    return name if objective == "answers" else f"{name}; {objective.replace('_', ' ')}"


def cells(key: tuple, runs: list[dict], base: dict | None) -> list[str]:
    """One row of the table. The perplexity is the change of the base model's, or itself without one."""
    shown = [name_of(key), f"{key[-1]:g}" if key[-1] else "", str(len(runs)) if key[-1] else ""]
    shown.append(f"{runs[0]['parameters']:,}" if runs[0]["parameters"] else "")
    for value in COLUMNS.values():
        shown.append(spread([value(run) for run in runs if has(run, value)], "{:.2f}"))
    if base is None or base in runs:
        return [*shown, spread([run["perplexity"] for run in runs if "perplexity" in run], "{:.2f}")]
    return [*shown, spread([change_of(run, base) for run in runs if "perplexity" in run], "{:+.1%}")]


def has(run: dict, value) -> bool:
    try:
        return value(run) is not None
    except KeyError:
        return False


def spread(values: list[float], form: str) -> str:
    """The mean, and from where to where."""
    if not values:
        return ""
    shown = form.format(mean(values))
    if len(values) > 1:
        shown += f" ({form.format(min(values))} to {form.format(max(values))})"
    return shown


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def change_of(run: dict, base: dict) -> float:
    """Of the perplexity, as a share of the base model's."""
    return run["perplexity"] / base["perplexity"] - 1


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
