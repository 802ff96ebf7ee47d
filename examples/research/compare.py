"""Train one method on prompts of five forms and measure it on forms that it never saw. One line of JSON a run.

    python examples/research/compare.py --model FOLDER --data FOLDER --out runs.jsonl --method routers --rate 5e-2

`--model` is a folder with SmolLM2-135M-Instruct (or another Llama without norms on queries), `--data` holds
`nq-open-oracle.jsonl.gz` and `leval-coursera.jsonl.gz`. All methods see the same prompts and the same text in the same
order. Frozen linear layers multiply in bfloat16, everything else is float32; `--float32` for all of it.
"""

import argparse
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from forms import docstrings
from measure import TASKS, measure
from methods import METHODS, UNTRAINED, freeze_to_best, halve, number_of_parameters, without_adapter
from objectives import OBJECTIVES, Draw, divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moice.training import collect_balance_loss

LORA_BELOW = 0.1
"""Rate of LoRA below routers, times that of the routers."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=float, default=0.0, help="share of the steps in which the rate rises")
    parser.add_argument("--keep_weight", type=float, default=2.0)
    parser.add_argument("--keep_tokens", type=int, default=192)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--train_on", choices=("forms", "facts"), default="forms", help="five forms, or lists of facts"
    )
    parser.add_argument("--prompts", type=int, help="different prompts, over and over; else each step has a new one")
    parser.add_argument("--joined", type=int, default=1, help="prompts of the five forms in one chat")
    parser.add_argument("--objective", choices=OBJECTIVES, default="answers")
    parser.add_argument("--freeze_to_best", action="store_true", help="static gates: keep each head's greatest only")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what is measured")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--save", type=Path, help="file for the trained parameters")
    parser.add_argument("--load", type=Path, help="such a file, in place of training")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    make, options = METHODS[args.method]
    model = make(model, {**options, "tokenizer": tokenizer})
    if not args.float32:
        halve(model)
    # Before switching adapters off and on, which asks gradients of all their parameters.
    parameters = number_of_parameters(model)
    start = time.perf_counter()
    losses, distances = [], []
    if args.load:
        saved = torch.load(args.load)
        losses, distances = saved.pop("losses"), saved.pop("distances")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(saved[name])
    elif args.method not in UNTRAINED:
        losses, distances = train(model, tokenizer, args)
    if args.freeze_to_best:
        freeze_to_best(model)
    seconds = {"train": time.perf_counter() - start}
    start = time.perf_counter()
    results = measure(model, tokenizer, args.data, tasks=args.tasks)
    seconds["measure"] = time.perf_counter() - start
    record = {
        "model": Path(args.model).resolve().name,
        "method": args.method,
        "rate": args.rate,
        "steps": len(losses),
        "seed": args.seed,
        "keep_weight": args.keep_weight,
        "train_on": args.train_on,
        "joined": args.joined,
        "prompts": args.prompts,
        "warmup": args.warmup,
        "objective": args.objective,
        "frozen": args.freeze_to_best,
        "float32": args.float32,
        "parameters": parameters if losses else 0,
        "loss_last_10": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
        "distance_last_10": sum(distances[-10:]) / len(distances[-10:]) if distances else None,
        **results,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": {name: round(value) for name, value in seconds.items()},
        "command": " ".join(["python examples/research/compare.py", *command(sys.argv[1:])]),
    }
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    if args.save:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save({**trained, "losses": losses, "distances": distances}, args.save)


def command(argv: list[str]) -> list[str]:
    """Arguments without the machine's folders."""
    folders = {"--model": "FOLDER", "--data": "FOLDER", "--adapter": "FOLDER"}
    folders |= {"--out": "FILE", "--save": "FILE", "--load": "FILE"}
    return [folders.get(before, word) for before, word in zip(["", *argv], argv, strict=False)]


def train(model, tokenizer, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Losses on the answers, and distances (KL) from the base model on ordinary text, of every step."""
    text = docstrings()
    text_ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    rates = [args.rate * (LORA_BELOW if below_routers(args.method, name) else 1.0) for name in names]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=args.rate, weight_decay=0.0)
    rng = random.Random(args.seed)
    draw = Draw(rng, text, text_ids, args.questions, facts=args.train_on == "facts", joined=args.joined)
    losses, distances = [], []
    is_balanced = METHODS[args.method][1].get("balance", 0.0) > 0
    model.train()
    for step in range(args.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / args.steps, args.warmup)
        if args.prompts:
            draw.rng = random.Random(args.seed * args.prompts + step % args.prompts)
        with collect_balance_loss(model) if is_balanced else nullcontext() as balance:
            loss = OBJECTIVES[args.objective](model, tokenizer, draw)
        (loss + balance.loss() if is_balanced else loss).backward()
        distance = 0.0
        if args.keep_weight:
            start = rng.randrange(len(text_ids) - args.keep_tokens)
            chunk = text_ids[None, start : start + args.keep_tokens]
            with torch.no_grad(), without_adapter(model):
                base = model(input_ids=chunk, use_cache=False).logits[0]
            kept = divergence(model(input_ids=chunk, use_cache=False).logits[0], base)
            (args.keep_weight * kept).backward()
            distance = kept.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        distances.append(distance)
        print(f"{args.method} {args.rate:g} step {step}: {losses[-1]:.3f} kl {distance:.4f}", flush=True)
    return losses, distances


def schedule(done: float, warmup: float) -> float:
    """Factor of the rate after a share `done` of the steps: a line up over the share `warmup`, then half a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def below_routers(method: str, name: str) -> bool:
    """Whether a parameter belongs to LoRA that is trained together with routers."""
    return method == "lora_below_routers" and "lora_" in name


if __name__ == "__main__":
    main(parse())
