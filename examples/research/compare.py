"""Train methods on prompts of five forms, and measure them on forms that they never saw.

    python examples/research/compare.py --model FOLDER --data FOLDER --out runs.jsonl --method base routers --rate 5e-2

Methods are the files of `methods/`. All see the same prompts and the same text in the same order. Every method runs at
every rate with every seed (once, if it has nothing to train), one after the other; each run is a line of JSON in the
log `--out`. What the log has already is not run again, so the same command goes on after a stop. At last the log is
printed as a table. Frozen linear layers multiply in bfloat16, everything else is float32; `--float32` for all of it.
"""

import argparse
import itertools
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
from methods import METHODS
from methods.static import freeze_to_best
from models import halve, number_of_parameters, without_adapter
from objectives import OBJECTIVES, Draw, divergence
from table import show
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moice.training import collect_balance_loss

MEASURED = ("model", "method", "frozen", "float32")
"""Fields of a record that tell runs apart which train nothing."""
TRAINED = (
    "rate", "seed", "keep_weight", "keep_tokens", "questions", "train_on", "joined", "prompts", "warmup", "objective",
)  # fmt: skip
"""Those that, and the number of steps, tell others apart as well."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, or another Llama")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with nq-open-oracle.jsonl.gz for the task nq (from github.com/nelson-liu/lost-in-the-middle) "
        "and leval-coursera.jsonl.gz for perplexity (Closed-ended-tasks/coursera.jsonl of github.com/OpenLMLab/LEval, "
        "packed with gzip); other tasks need none",
    )
    parser.add_argument("--out", required=True, type=Path, help="log that lines are added to")
    parser.add_argument(
        "--method", required=True, nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--rate", type=float, nargs="+", default=[0.0], help="learning rates")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of weights and prompts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=float, default=0.0, help="share of the steps in which the rate rises")
    parser.add_argument("--keep_weight", type=float, default=2.0, help="of the divergence from the base model")
    parser.add_argument("--keep_tokens", type=int, default=192, help="of ordinary text, on which it is taken")
    parser.add_argument("--questions", type=int, default=4, help="in a prompt")
    parser.add_argument(
        "--train_on", choices=("forms", "facts"), default="forms", help="five forms, or lists of facts"
    )
    parser.add_argument("--prompts", type=int, help="different prompts, over and over; else each step has a new one")
    parser.add_argument("--joined", type=int, default=1, help="prompts of the five forms in one chat")
    parser.add_argument("--objective", choices=OBJECTIVES, default="answers")
    parser.add_argument("--freeze_to_best", action="store_true", help="static gates: keep each head's greatest only")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what is measured")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--save", type=Path, help="file for the trained parameters of one run")
    parser.add_argument("--load", type=Path, help="such a file, in place of training")
    return parser


def main(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a task without its data, several runs with one file of parameters, or a method to train without a rate.
    """
    if args.data is None and {"nq", "perplexity"} & {*args.tasks}:
        raise ValueError("The tasks nq and perplexity need --data; --help says what it holds.")
    runs = [*itertools.product(args.method, args.rate, args.seed)]
    if len(runs) > 1 and (args.save or args.load):
        raise ValueError(f"--save and --load take the parameters of one run, and these are {len(runs)}.")
    for method, rate, seed in runs:
        one = argparse.Namespace(**{**vars(args), "method": method, "rate": rate, "seed": seed})
        if not any(is_run(record, one) for record in read(args.out)):
            record = run(one)
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    show(read(args.out))


def read(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def settings(args: argparse.Namespace) -> dict:
    """What a record says of how it came about."""
    named = {"model": Path(args.model).resolve().name, "frozen": args.freeze_to_best}
    return {name: named.get(name, getattr(args, name, None)) for name in MEASURED + TRAINED}


def is_run(record: dict, args: argparse.Namespace) -> bool:
    """Whether a record is of the run that the arguments ask for. Fields that it lacks had their defaults."""
    names, wanted = MEASURED, {**settings(args), "steps": args.steps}
    if record["parameters"]:
        names = (*MEASURED, *TRAINED, "steps")
    same = all(record.get(name, DEFAULTS.get(name)) == wanted[name] for name in names)
    return same and all(task in record for task in args.tasks)


def run(args: argparse.Namespace) -> dict:
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
    elif parameters:
        if not args.rate:
            raise ValueError(f"{args.method} trains {parameters:,} parameters. Give its learning rate by --rate.")
        losses, distances = train(model, tokenizer, args)
    if args.freeze_to_best:
        freeze_to_best(model)
    seconds = {"train": time.perf_counter() - start}
    start = time.perf_counter()
    results = measure(model, tokenizer, args.data, tasks=args.tasks)
    seconds["measure"] = time.perf_counter() - start
    if args.save:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save({**trained, "losses": losses, "distances": distances}, args.save)
    return {
        **settings(args),
        "rate": args.rate if parameters else 0.0,
        "steps": len(losses),
        "parameters": parameters,
        "loss_last_10": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
        "distance_last_10": sum(distances[-10:]) / len(distances[-10:]) if distances else None,
        **results,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": {name: round(value) for name, value in seconds.items()},
        "command": " ".join(["python examples/research/compare.py", *command(sys.argv[1:])]),
    }


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
    factors = METHODS[args.method][1].get("rates", {})
    rates = [args.rate * next((f for part, f in factors.items() if part in name), 1.0) for name in names]
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


DEFAULTS = vars(parser().parse_args(["--model", "", "--out", "", "--method", "base"]))


if __name__ == "__main__":
    main(parser().parse_args())
