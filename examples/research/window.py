"""What happens beyond a model's window, under ropes exchanged as a whole and under ropes by position and distance?

    python examples/research/window.py --data FOLDER --out FILE
    python examples/research/window.py --data FOLDER --out FILE --methods base cut "near 0.75, linear, 4" --texts 1
    python examples/research/window.py --table examples/research/window.jsonl --picture docs/images/window.png

Loss of running text by position, and the loss and share of exactly right codes asked for at the end of the text, from
some distances back. `--data` holds `leval-sci_fi.jsonl.gz`, whose novels have numbers; other texts are files. Facts
are written into the text, and their tokens do not count for its loss. One line of JSON for each text and method; those
that the log has are not run again.
"""

import argparse
import copy
import gzip
import itertools
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import get_peft_model
from transformers import DynamicCache

from peft_moice import MoICEConfig
from peft_moice.evaluation import sample_facts
from peft_moice.evaluation.intervals import bootstrap_interval
from peft_moice.evaluation.plotting import plot_losses
from peft_moice.tuner.extending import extension_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import load_model

ENDS = (0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Where spans of the text end, in windows; from 1 on, losses are of what lies beyond."""
BINS_OF_A_WINDOW = 16
DISTANCES = (0.25, 0.75, 1.25, 1.75, 2.75, 3.75)
"""How far back facts lie, in windows."""
METHODS = {
    "base": {},
    "cut": {},
    "near 0.75, linear, 4": {"near": 0.75, "factor": 4},
    "yarn 2": {"rope_type": "yarn", "factor": 2.0},
    "yarn 4": {"rope_type": "yarn", "factor": 4.0},
    "by position, yarn 2": {"ropes": {"rope_type": "yarn", "factor": 2.0}},
    "by position, yarn 4": {"ropes": {"rope_type": "yarn", "factor": 4.0}},
    "near 0.5, linear, 4": {"near": 0.5, "factor": 4},
    "near 0.75, linear, 2": {"near": 0.75, "factor": 2},
    "near 0.75, yarn 8": {"near": 0.75, "far": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.0}},
    "near 0.5, yarn 4": {"near": 0.5, "far": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
    "near 0.25, linear, 4": {"near": 0.25, "factor": 4},
    "dynamic 2": {"rope_type": "dynamic", "factor": 2.0},
    "rope_theta times 4": {"theta": 4.0},
}

OURS = "near 0.75, linear, 4"


def print_table(file: Path) -> None:
    """Tables in Markdown of what a log holds, methods in groups that have read the same texts to the same length."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    read: dict = {}
    for row in rows:
        read.setdefault((row["length"], row["method"]), {})[row["text"]] = row
    groups = {}
    for length, texts in dict.fromkeys((length, tuple(sorted(of_texts))) for (length, _), of_texts in read.items()):
        groups[length, texts] = {
            method: [of_texts[text] for text in texts]
            for (other, method), of_texts in read.items()
            if other == length and of_texts.keys() >= set(texts)
        }
    for (length, texts), methods in groups.items():
        print(f"Texts {', '.join(map(str, texts))}, {length:g} windows:\n")
        print_means(methods)
        if OURS in methods and len(methods) > 1:
            print_differences(methods)


def print_means(methods: dict) -> None:
    """Mean losses over texts; codes that are right, of how many, and the mean loss of their tokens."""
    spans, distances = (list(next(iter(methods.values()))[0][key]) for key in ("losses", "facts"))
    back = [f"codes {float(distance):g} windows back" for distance in distances]
    print(f"| | {' | '.join([*spans, *back])} |\n|{'---|' * (1 + len(spans) + len(back))}")
    for method, rows in methods.items():
        cells = []
        for span in spans:
            values = [row["losses"][span] for row in rows]
            cells.append("-" if None in values else f"{sum(values) / len(values):.3f}")
        for distance in distances:
            right = [is_right for row in rows for is_right in row["facts"][distance]["right"]]
            losses = [loss for row in rows for loss in row["facts"][distance]["losses"]]
            cells.append(f"{sum(right)} of {len(right)}, {sum(losses) / len(losses):.2f}")
        print(f"| {method} | {' | '.join(cells)} |")
    print()


def print_differences(methods: dict) -> None:
    """What methods lose to ours, with intervals of 95% by drawing bins of text, and questions, in pairs."""
    print(f"Minus {OURS}:\n\n| | loss within | loss beyond | loss of codes |\n|---|---|---|---|")
    for method, rows in methods.items():
        if method != OURS:
            within, beyond, codes = [], [], []
            for theirs, ours in zip(rows, methods[OURS], strict=True):
                pairs = list(zip(theirs["bins"], ours["bins"], strict=True))
                within += [a - b for a, b in pairs[:BINS_OF_A_WINDOW] if a is not None]
                beyond += [a - b for a, b in pairs[BINS_OF_A_WINDOW:]]
                for asked, of_ours in zip(theirs["facts"].values(), ours["facts"].values(), strict=True):
                    codes += [a - b for a, b in zip(asked["losses"], of_ours["losses"], strict=True)]
            print(f"| {method} | {' | '.join(map(with_interval, (within, beyond, codes)))} |")
    print()


def with_interval(differences: list[float]) -> str:
    if not differences:
        return "-"
    low, high = bootstrap_interval([[difference] for difference in differences])
    return f"{sum(differences) / len(differences):+.3f} ({low:+.3f} to {high:+.3f})"


def draw(file: Path, picture: Path) -> None:
    """The mean loss by position over the texts that all of a few methods have read."""
    names = {"base": "base", "yarn 4": "YaRN 4 in place of the rope", OURS: "extend(factor=4)"}
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["method"] in names]
    rows = [row for row in rows if row["length"] == rows[0]["length"]]
    texts = set.intersection(*({row["text"] for row in rows if row["method"] == method} for method in names))
    width = rows[0]["window"] // BINS_OF_A_WINDOW
    curves = {}
    for method, name in names.items():
        bins = [row["bins"] for row in rows if row["method"] == method and row["text"] in texts]
        losses = [sum(values) / len(values) for values in zip(*bins, strict=True)]
        curves[name] = SimpleNamespace(centers=[width * (i + 0.5) for i in range(len(losses))], losses=losses)
    title = f"SmolLM2-135M-Instruct, window {rows[0]['window']:,}: {len(texts)} novels"
    figure = plot_losses(curves, title=title)
    for axes in figure.axes:
        axes.set_xscale("linear")
        axes.axvline(rows[0]["window"], color="gray", linestyle=":")
    figure.savefig(picture, dpi=150)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    done = set()
    if args.out.exists():
        rows = map(json.loads, args.out.read_text().splitlines())
        done = {(row["length"], row["text"], row["method"]) for row in rows}
    for text in args.texts:
        for method in args.methods:
            if (args.length, name_of(text), method) not in done:
                row = run(args, text, method)
                print(json.dumps(row), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


@torch.no_grad()
def run(args: argparse.Namespace, text: int | str, method: str) -> dict:
    model, tokenizer = load_model(args.model)
    model.eval()
    window = args.window or model.config.max_position_embeddings
    ids, counts, facts = text_with_facts(tokenizer, args, text, window)
    started = time.perf_counter()
    if method == "cut":
        losses, cache = losses_when_cut(model, ids, window)
    else:
        changed = under(model, window, METHODS[method])
        if method != "base" and not is_own_within(METHODS[method]):
            losses, cache = losses_of(changed, ids)
        else:
            losses, cache = losses_beyond(model, changed, ids, (args.model, window, text, args.questions))
        model = changed
    seconds = time.perf_counter() - started
    bins = [
        losses[first : first + window // BINS_OF_A_WINDOW][counts[1:][first : first + window // BINS_OF_A_WINDOW]]
        for first in range(0, losses.shape[0], window // BINS_OF_A_WINDOW)
    ]
    edges = [0, *(int(end * window) for end in ENDS if end <= args.length)]
    spans = {}
    for first, end in itertools.pairwise(edges):
        kept = losses[max(first - 1, 0) : end - 1][counts[max(first, 1) : end]]
        spans[f"{first} to {end}"] = kept.mean().item() if first >= window or method != "cut" else None
    asked = {str(distance): ask(model, tokenizer, cache, of_distance) for distance, of_distance in facts.items()}
    return {
        "text": name_of(text),
        "method": method,
        "window": window,
        "length": args.length,
        "losses": spans,
        "bins": [None if kept.isnan().any() else round(kept.mean().item(), 4) for kept in bins],
        "facts": asked,
        "seconds": round(seconds),
        "command": "python examples/research/window.py --data FOLDER --out FILE "
        f"{'--model FOLDER ' if args.model else ''}--length {args.length:g} --texts {name_of(text)} "
        f"--methods {method!r}" + (f" --distances {' '.join(map(str, args.distances))}" if args.distances else ""),
    }


def under(model, window: int, options: dict):
    """The model under a method's ropes."""
    model.config.max_position_embeddings, parameters = window, model.config.rope_parameters
    own = dict(parameters.get("full_attention", parameters))
    if "theta" in options:
        own["rope_theta"] *= options["theta"]
    if "rope_type" in options:
        own |= {**options, "original_max_position_embeddings": window}
    if "theta" in options or "rope_type" in options:
        by_type = "full_attention" in parameters
        model.config.rope_parameters = {**parameters, "full_attention": own} if by_type else own
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model
    within, beyond = {"query_positions": [0, window]}, {"query_positions": [window, None]}
    if "ropes" in options:
        config = MoICEConfig(ropes=[within, {**beyond, **options["ropes"]}])
    elif "far" in options:
        near = int(options["near"] * window)
        rules = [{**beyond, "distances": [0, near]}, {**beyond, "distances": [near, None], **options["far"]}]
        config = MoICEConfig(ropes=[within, *rules])
    elif "near" in options:
        config = extension_config(model.config, options["factor"], near=int(options["near"] * window))
    else:
        return model
    return get_peft_model(model, config).get_base_model()


def is_own_within(options: dict) -> bool:
    """Whether nothing changes within the window."""
    return "near" in options or "ropes" in options


def text_with_facts(tokenizer, args: argparse.Namespace, text: int | str, window: int):
    """Token ids `[1, S]` of a text, which of them count for its loss, and facts by their distance in windows."""
    questions, distances = args.questions, args.distances or [d for d in DISTANCES if d < args.length - 0.1]
    # A novel that is too short is followed by the next one.
    is_file = isinstance(text, str)
    texts = [Path(text).read_text(encoding="utf-8")] if is_file else novels_of(args.data)[text : text + 2]
    tokens = itertools.chain.from_iterable(tokenizer(text).input_ids for text in texts)
    rng, length = random.Random(0 if is_file else text), int(args.length * window)
    drawn = sample_facts(questions * len(distances), rng, split="eval")
    facts, places = {}, {}
    for index, distance in enumerate(distances):
        facts[distance] = list(zip(drawn.names, drawn.codes, strict=True))[index * questions : (index + 1) * questions]
        for i, fact in enumerate(facts[distance]):
            # Spread over an eighth of a window around the distance.
            places[length - int((distance + (i / questions - 0.5) / 8) * window)] = fact
    ids, counts = [], []
    while len(ids) < length:
        reached = [place for place in places if place <= len(ids)]
        if reached:
            name, code = places.pop(min(reached))
            sentence = tokenizer(f" The access code of {name} is {code}.", add_special_tokens=False).input_ids
            ids += sentence
            counts += [False] * len(sentence)
        ids.append(next(tokens))
        counts.append(True)
    return torch.tensor([ids[:length]]), torch.tensor(counts[:length]), facts


def novels_of(folder: Path) -> list[str]:
    with gzip.open(folder / "leval-sci_fi.jsonl.gz", "rt", encoding="utf-8") as lines:
        return list(dict.fromkeys(json.loads(line)["input"] for line in lines))


def question(name: str, code: str) -> tuple[str, str]:
    """What asks for a code, and the answer."""
    return f"\n\nThe access code of {name} is", f" {code}"


_WITHIN: dict = {}
"""What the base model has made of the window of the last text, which some methods go on from."""


def losses_beyond(base, model, ids: torch.Tensor, key: tuple):
    """As [`losses_of`], with the window read by the base model, once for all methods that leave it as it is."""
    window = key[1]
    if key not in _WITHIN:
        _WITHIN.clear()
        _WITHIN[key] = losses_of(base, ids[:, :window], ids[0, 1 : window + 1])
    within, cache = _WITHIN[key]
    beyond, cache = losses_of(model, ids[:, window:], ids[0, window + 1 :], copy.deepcopy(cache))
    return torch.cat((within, beyond)), cache


def losses_of(model, ids: torch.Tensor, targets: torch.Tensor | None = None, cache: DynamicCache | None = None):
    """The loss of `targets`, by default every token but the first, `[S - 1]`, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    states = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
    losses = []
    for some, of_them in zip(states.split(512), (ids[0, 1:] if targets is None else targets).split(512), strict=False):
        logits = model.lm_head(some[: len(of_them)]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, of_them, reduction="none"))
    return torch.cat(losses), cache


def losses_when_cut(model, ids: torch.Tensor, window: int):
    """As [`losses_of`], with at least half a window and at most a whole one before each token beyond the window."""
    losses, half = torch.full((ids.shape[1] - 1,), torch.nan), window // 2
    # (Of what lies within the window there is no loss: that is the base model's.)
    for first in range(window, ids.shape[1], half):
        found, cache = losses_of(model, ids[:, first - half : first + half])
        losses[first - 1 : first + half - 1] = found[half - 1 :]
    return losses, cache


def ask(model, tokenizer, cache: DynamicCache, facts) -> dict:
    """Mean loss of a code's tokens, and the share of codes that are right in all, behind the text in `cache`."""
    losses, right = [], []
    slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    for name, code in facts:
        prompt, answer = (tokenizer(part, add_special_tokens=False).input_ids for part in question(name, code))
        ids = torch.tensor([[*prompt, *answer]])
        # Layers that slide have forgotten what a crop would have to bring back.
        logits = model(ids, past_key_values=copy.deepcopy(cache) if slides else cache).logits
        if not slides:
            cache.crop(-ids.shape[1])
        logits = logits[0, len(prompt) - 1 : -1].float()
        targets = torch.tensor(answer)
        losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
        right.append(bool((logits.argmax(dim=-1) == targets).all()))
    return {"losses": losses, "right": right}


def number_or_file(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def name_of(text: int | str) -> int | str:
    return text if isinstance(text, int) else Path(text).name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print what this log holds")
    parser.add_argument("--picture", type=Path, help="with --table: draw loss by position there")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--texts", nargs="+", type=number_or_file, default=[1, 3, 5], help="novels or files")
    parser.add_argument("--length", type=float, default=2.0, help="of the texts, in windows; at least 1.5")
    parser.add_argument("--distances", nargs="+", type=float, help="of facts, in windows")
    parser.add_argument("--questions", type=int, default=10, help="at each distance")
    parser.add_argument("--window", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    if parsed.table:
        print_table(parsed.table)
        if parsed.picture:
            draw(parsed.table, parsed.picture)
    elif parsed.data is None or parsed.out is None:
        parser.error("--data and --out are needed, or --table")
    else:
        main(parsed)
