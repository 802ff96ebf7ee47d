"""What can training add to an extension? Numbers for each head, gates and LoRA, trained on caches of long texts.

    python examples/research/learned_window.py --data FOLDER --out FILE
    python examples/research/learned_window.py --table examples/research/learned_window.jsonl

A cache holds 1.5 windows of novels under `extend(factor=4)`, without gradient. Trained are the losses of questions
behind it, about codes written into the text, and of pieces of the text beyond the window. Measured on other novels,
those of `window.py`, with its questions, and on the 256 tokens that come next. All of these stand beyond the window:
nothing that is trained here changes what lies within.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AttentionInterface, DynamicCache
from window import METHODS, OURS, losses_of, novels_of, question, text_with_facts, under, with_interval

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import load_model

TRAINED_ON = ((0, 4), (6, 0), (4, 6))
"""Novels, joined, that nothing is measured on."""
MEASURED_ON = (1, 2, 3, 5)
LENGTH, FACTOR, NEAR = 1.5, 4.0, 0.75
NEXT = 256
"""Tokens of the novel behind the cache."""
KINDS = {
    "untrained": (),
    "ln m / ln window": (),
    "one temperature": ("all_scores",),
    "temperatures of heads": ("near_scores", "far_scores"),
    "near of heads": ("near",),
    "factor of heads": ("rate",),
    "near, factor and temperatures of heads": ("near", "rate", "near_scores", "far_scores"),
    "routers over near 0.75, 0.5, 0.25": ("gates",),
    "LoRA r = 1 on queries": (),
}


class Rules(nn.Module):
    """Attention with a rope by distance whose numbers can be trained: for each head, or in all of the model.

    Args:
        kind: of [`KINDS`].
        config: of the model.
        window: its window.
    """

    def __init__(self, kind: str, config, window: int):
        super().__init__()
        heads, layers, half = config.num_attention_heads, config.num_hidden_layers, config.head_dim // 2
        self.kind, self.window, trained = kind, window, KINDS[kind]
        self.theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        sizes = {"near": (layers, heads), "rate": (layers, heads), "all_scores": (1,)}
        sizes |= {"near_scores": (layers, heads), "far_scores": (layers, heads)}
        # Logarithms of what is multiplied.
        self.logs = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(sizes[name])) for name in sizes if name in trained}
        )
        self.gates = None
        if "gates" in trained:
            # Starts near the default rule.
            self.gates = nn.ModuleList(nn.Linear(config.hidden_size, 3 * heads) for _ in range(layers))
            for gate in self.gates:
                nn.init.zeros_(gate.weight)
                gate.bias.data = torch.tensor([2.0, 0.0, 0.0]).repeat(heads)
        self.positions = self.states = None

    def times(self, name: str, layer: int, x):
        """`x`, `[H or 1, ...]` with two more dimensions, times what is trained under a name."""
        if name not in self.logs:
            return x
        log = self.logs[name]
        return (log if log.dim() == 1 else log[layer]).exp().reshape(-1, 1, 1) * x

    def attend(self, module, query, key, value, mask, scaling, **options):
        """In the form of transformers' attention functions, for one row. What is near and far is positions' affair."""
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        places, of_keys = self.positions, torch.arange(key.shape[2])
        of_keys[-len(places) :] = places
        query, values = query[0] * scaling, value[0].repeat_interleave(group, dim=0)
        distances = places[:, None] - of_keys
        seen = torch.zeros(distances.shape).masked_fill(~self.visible, -torch.inf)
        own = torch.einsum("gqsd,gtd->gqst", query.unflatten(0, (-1, group)), key[0]).flatten(0, 1)
        outputs = []
        for share in (NEAR, 0.5, 0.25) if self.gates is not None else (NEAR,):
            near = torch.full((1, 1, 1), share * self.window)
            rate = self.times("rate", layer, (self.window - near) / (FACTOR * self.window - near))
            # The farthest key's angle stays among those that the model was trained for.
            near = self.times("near", layer, near).clamp(1, 0.92 * self.window)
            count = int((places.max() - near.min()).item()) + 1
            turn = self.theta * (rate - 1)  # [H or 1, 1, P]
            asks = rotated(query, turn * (places[:, None] - near))
            keys = key[0, :, :count]
            if rate.shape[0] > 1:
                keys = keys.repeat_interleave(group, dim=0)
            keys = rotated(keys, turn * torch.arange(count)[:, None])
            if keys.shape[0] < asks.shape[0]:
                far = torch.einsum("gqsd,gtd->gqst", asks.unflatten(0, (-1, group)), keys).flatten(0, 1)
            else:
                far = asks @ keys.mT
            near_scores = self.times("near_scores", layer, own)
            far_scores = self.times("far_scores", layer, far)
            far_scores = torch.where(distances[:, :count] >= near, far_scores, near_scores[..., :count])
            scores = self.times("all_scores", layer, torch.cat((far_scores, near_scores[..., count:]), dim=-1))
            if self.kind == "ln m / ln window":
                scores = scores * (places.log() / math.log(self.window))[:, None]
            outputs.append((scores + seen).softmax(dim=-1) @ values)
        if self.gates is not None:
            gates = self.gates[layer](self.states)[0].unflatten(-1, (-1, 3)).softmax(dim=-1)  # [S, H, K]
            output = sum(gates[..., i].T[..., None] * of_rule for i, of_rule in enumerate(outputs))
        else:
            output = outputs[0]
        return output.transpose(0, 1)[None], None

    def losses(self, model, prefix: list, parts: list[tuple[int, list[int], int]]) -> list[torch.Tensor]:
        """The losses of the last tokens of parts of text, each behind the first `start` tokens of `prefix`.

        Args:
            model: the model, whose attention is [`Rules.attend`].
            prefix: keys and values of each layer.
            parts: where each begins, its ids, and how many of its last tokens count.
        """
        lengths = torch.tensor([len(ids) for _, ids, _ in parts])
        number = torch.repeat_interleave(torch.arange(len(parts)), lengths)
        self.positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids, _ in parts])
        starts = torch.tensor([start for start, _, _ in parts])[number]
        inside = (number[:, None] == number) & (self.positions[:, None] >= self.positions)
        self.visible = torch.cat((torch.arange(prefix[0][0].shape[2]) < starts[:, None], inside), dim=1)
        ids = torch.tensor([[token for _, ids, _ in parts for token in ids]])
        cache = DynamicCache(prefix)
        logits = model(ids, position_ids=self.positions[None], past_key_values=cache, use_cache=True).logits[0]
        losses, first = [], 0
        for _, of_part, count in parts:
            end = first + len(of_part)
            losses.append(
                cross_entropy(logits[end - count - 1 : end - 1], ids[0, end - count : end], reduction="none")
            )
            first = end
        return losses


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """`[H, S, D]` by angles `[H or 1, S, P]`, pairs of coordinates in two halves."""
    (first, second), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.no_grad()
def prepare(args: argparse.Namespace, base, tokenizer, text: int | str, questions: int, file: Path) -> dict:
    """A text, what is asked about it, and its cache under `extend`, from `file` if that is there.

    Returns:
        `ids`, of which the last 256 are not in the cache; `asked`, pairs of ids of questions and codes; `prefix`, keys
        and values of each layer.
    """
    window = args.window or base.config.max_position_embeddings
    distances = [distance + NEXT / window for distance in (0.25, 0.75, 1.25)]
    options = {"data": args.data, "length": LENGTH + NEXT / window, "questions": questions, "distances": distances}
    ids, _, facts = text_with_facts(tokenizer, argparse.Namespace(**options), text, window)
    asked = [
        tuple(tokenizer(part, add_special_tokens=False).input_ids for part in question(name, code))
        for some in facts.values()
        for name, code in some
    ]
    if not file.exists():
        cache = losses_of(base, ids[:, :window])[1]
        _, cache = losses_of(under(copy.deepcopy(base), window, METHODS[OURS]), ids[:, window:-NEXT], cache=cache)
        torch.save([(layer.keys, layer.values) for layer in cache.layers], file)
    return {"ids": ids[0].tolist(), "asked": asked, "prefix": torch.load(file, mmap=True)}


def train(rules: Rules, model, args: argparse.Namespace, caches: list[dict]) -> list[float]:
    """Adam on the loss of codes, and twice that of a piece of text beyond the window, each the mean of its tokens."""
    trained = [parameter for parameter in (*rules.parameters(), *model.parameters()) if parameter.requires_grad]
    rate = args.rate if len(rules.logs) else args.rate / 10
    optimizer, rng, losses = torch.optim.Adam(trained, lr=rate), random.Random(args.seed), []
    for step in tqdm(range(args.steps), desc=rules.kind):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / args.steps)) / 2
        cache = caches[step % len(caches)]
        length = cache["prefix"][0][0].shape[2]
        parts = [(length, [*asks, *code], len(code)) for asks, code in rng.sample(cache["asked"], 2)]
        start = rng.randrange(rules.window, length)
        parts.append((start, cache["ids"][start : start + 25], 24))
        *codes, text = rules.losses(model, cache["prefix"], parts)
        loss = torch.cat(codes).mean() + 2 * text.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def measure(rules: Rules, model, caches: list[dict]) -> tuple[list, list]:
    """Losses of codes, and of pieces of 32 tokens of what comes next, one after the other in all texts."""
    codes, text = [], []
    for cache in caches:
        length, following = len(cache["ids"]) - NEXT, cache["ids"][-NEXT:]
        asked = [(length, [*asks, *code], len(code)) for asks, code in cache["asked"]]
        for first in range(0, len(asked), 10):
            codes += [loss.mean().item() for loss in rules.losses(model, cache["prefix"], asked[first : first + 10])]
        (losses,) = rules.losses(model, cache["prefix"], [(length, following, NEXT - 1)])
        text += [piece.mean().item() for piece in losses.split(32)]
    return codes, text


def under_rules(kind: str, model, window: int) -> tuple[Rules, nn.Module]:
    """The rules of a kind, and the model that attends by them, of which nothing but LoRA is trained."""
    model.requires_grad_(False)
    rules = Rules(kind, model.config, window)
    AttentionInterface.register("rules", rules.attend)
    model.set_attn_implementation("rules")
    for layer in model.model.layers if rules.gates is not None else ():
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, options: setattr(rules, "states", options["hidden_states"]), with_kwargs=True
        )
    if kind.startswith("LoRA"):
        model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    return rules, model


def run(args: argparse.Namespace, base, kind: str, trained_on: list[dict], measured_on: list[dict]) -> dict:
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    rules, model = under_rules(kind, copy.deepcopy(base), args.window or base.config.max_position_embeddings)
    trained = [p for p in (*rules.parameters(), *model.parameters()) if p.requires_grad]
    losses = train(rules, model, args, trained_on) if trained else []
    codes, text = measure(rules, model, measured_on)
    return {
        "kind": kind,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in trained),
        "steps": len(losses),
        "codes": [round(loss, 4) for loss in codes],
        "text": [round(loss, 4) for loss in text],
        "training": [round(loss, 3) for loss in losses],
        "learned": {
            name: [round(f(log.exp()).item(), 3) for f in (torch.min, torch.median, torch.max)]
            for name, log in rules.logs.items()
        },
        "seconds": round(time.perf_counter() - started),
        "command": f"python examples/research/learned_window.py --data FOLDER --out FILE --kinds {kind!r} "
        f"--steps {args.steps} --rate {args.rate:g} --seed {args.seed}",
    }


def print_table(file: Path) -> None:
    """Mean losses, and differences from the untrained rule with intervals of 95%, paired."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (untrained,) = (row for row in rows if row["kind"] == "untrained")
    print("| | parameters | loss of codes | minus untrained | loss of text | minus untrained |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["kind"], str(row["parameters"])]
        for name in ("codes", "text"):
            cells.append(f"{sum(row[name]) / len(row[name]):.3f}")
            pairs = [a - b for a, b in zip(row[name], untrained[name], strict=True)]
            cells.append("-" if row is untrained else with_interval(pairs))
        print(f"| {' | '.join(cells)} |")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.caches.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_model(args.model)
    base.eval()
    novels, trained_on, measured_on = novels_of(args.data), [], []
    for number, some in enumerate(TRAINED_ON):
        joined = args.caches / f"{number}.txt"
        joined.write_text("\n\n".join(novels[novel] for novel in some), encoding="utf-8")
        # Another number of questions draws others.
        options = str(joined), args.questions + number, args.caches / f"train_{number}.pt"
        trained_on.append(prepare(args, base, tokenizer, *options))
    for novel in MEASURED_ON[: args.texts]:
        options = novel, args.questions, args.caches / f"measure_{novel}.pt"
        measured_on.append(prepare(args, base, tokenizer, *options))
    for kind in args.kinds:
        row = run(args, base, kind, trained_on, measured_on)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print what this log holds")
    parser.add_argument("--caches", type=Path, default=Path("outputs/learned_window"), help="4 GB of files")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--texts", type=int, default=len(MEASURED_ON), help="measured")
    parser.add_argument("--questions", type=int, default=10, help="at each distance")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--rate", type=float, default=0.03, help="of Adam on logarithms; a tenth of it on gates and LoRA"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    if parsed.table:
        print_table(parsed.table)
    elif parsed.data is None or parsed.out is None:
        parser.error("--data and --out are needed, or --table")
    else:
        main(parsed)
