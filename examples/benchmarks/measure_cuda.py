"""Measures what is to be known on a GPU, within eight minutes and in the order of worth.

It has not been run on one yet: none was at hand.

    python examples/benchmarks/measure_cuda.py

1. the tests of the Triton kernels, on the device;
2. every implementation against `reference` on random problems, in outputs and gradients, by dtype, head size and
   layout, up to 1,000 queries and 5,000 keys (several tiles of each kernel);
3. one layer's attention in bfloat16 at the shapes of Llama-2-7B and Llama-3-8B, N = 7 rope bases: prefill, training
   and one decoded token for every implementation, beside PyTorch's attention under one base; with the share of the
   device's peak rate, for which all K attentions are counted;
4. a step of decoding, prefill and memory of a whole Llama of about a billion random weights, against its base;
5. compute-sanitizer on small problems, if it is installed.

Every figure is one line of JSON, printed when it is measured and added to `--output`. What does not fit the time is
left out, and named.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moice import MoICEConfig
from peft_moice.attention import IMPLEMENTATIONS, mixed_attention
from peft_moice.attention.call import AttentionCall
from peft_moice.evaluation.reader import cache_keyword
from peft_moice.rope import RotaryLayout, RotationTable
from peft_moice.routing.router import select_experts
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

SHAPES = {"Llama-2-7B": (32, 32, 10000.0), "Llama-3-8B": (32, 8, 500000.0)}
"""Query heads, key-value heads, rope_theta; all heads have 128 dimensions."""
HEAD_DIM = 128
NUM_EXPERTS = len(RELEASED_MULTIPLIERS)
TIMED = ("triton", "folded", "delegated")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16 rates by a part of the device's name, from NVIDIA's data sheets."""
MOST_ERROR = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference to `reference` that is taken for rounding, as a share of the largest value."""
TESTS = Path(__file__).parents[2] / "tests"
Figure = dict[str, Any]


def device_tests(args: argparse.Namespace) -> Iterator[Figure]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "test_triton.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds)
    yield {"status": done.returncode, "end": done.stdout.strip().splitlines()[-3:]}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A random problem on which implementations are compared with `reference`."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    top_k: int
    mask: str | None


PROBLEMS = (
    Problem(1, 2, 2, 40, 40, 4, None),
    Problem(2, 6, 2, 33, 70, 2, None),
    Problem(2, 4, 1, 20, 50, 1, "boolean"),
    Problem(1, 4, 4, 17, 17, 2, "additive"),
    Problem(2, 6, 2, 1, 90, 2, None),
    Problem(1, 4, 2, 1000, 5000, 2, None),
    Problem(1, 2, 1, 1000, 5000, 4, "boolean"),
    Problem(2, 6, 2, 1, 5000, 2, None),
)


def comparison(args: argparse.Namespace) -> Iterator[Figure]:
    names = sorted(set(IMPLEMENTATIONS) - {"reference"})
    for dtype, head_dim, interleaved in itertools.product(args.dtypes, args.head_dims, (False, True)):
        for problem in PROBLEMS:
            call = random_call(problem, args.device, getattr(torch, dtype), RotaryLayout(0, head_dim, interleaved))
            expected = with_gradients("reference", call)
            for name in names:
                where = {"dtype": dtype, "layout": "interleaved" if interleaved else "half"}
                figure = {"implementation": name, **where, "head_dim": head_dim, **dataclasses.asdict(problem)}
                yield {**figure, **compared(name, call, expected)}


def compared(name: str, call: AttentionCall, expected: dict[str, torch.Tensor]) -> Figure:
    """What is wrong with the implementation `name` on `call`, under "fault"; None if nothing is."""
    reason = IMPLEMENTATIONS[name].why_not(call)
    if reason is not None:
        return {"refused": reason}
    try:
        actual = with_gradients(name, call)
    except Exception as error:
        # A compiler or driver that fails does so with errors of its own.
        return {"fault": f"{type(error).__name__}: {str(error)[:300]}"}
    worst = {}
    for part, ours in actual.items():
        error, largest = ((x.float()).abs().max().item() for x in (ours.float() - expected[part], expected[part]))
        worst[part] = error / max(largest, 1e-3)
    part = max(worst, key=lambda part: math.inf if math.isnan(worst[part]) else worst[part])
    right = worst[part] <= MOST_ERROR[call.query.dtype]
    return {"error": worst[part], "fault": None if right else f"{part} is off by {worst[part]:.1e}"}


def random_call(problem: Problem, device: str, dtype: torch.dtype, layout: RotaryLayout) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    bases = (1e4, 2.5e3, 4e4, 1.6e5)
    shapes = (problem.heads, problem.queries), (problem.kv_heads, problem.keys), (problem.kv_heads, problem.keys)
    query, key, value = (
        torch.randn(problem.batch, *shape, layout.size, generator=generator).to(device, dtype) for shape in shapes
    )
    logits = torch.randn(problem.batch, problem.heads, problem.queries, len(bases), generator=generator)
    pairs = torch.arange(0, layout.size, 2, dtype=torch.float64) / layout.size
    frequencies = torch.stack([base**-pairs for base in bases])
    start, order = problem.keys - problem.queries, torch.arange(problem.keys)
    visible = order <= start + torch.arange(problem.queries)[:, None]
    mask = None if problem.mask is None else visible & (order % 7 != 3) | (order == 0)
    if mask is not None:
        mask = mask.expand(problem.batch, 1, -1, -1)
        low = torch.finfo(dtype).min
        mask = mask if problem.mask == "boolean" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
        mask = mask.to(device)
    gates = select_experts(logits, problem.top_k).to(device)
    rotations = RotationTable(frequencies - frequencies[0], layout)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> tuple[torch.Tensor, None]:
        mask = visible.to(device) if mask is None else mask
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        return output.transpose(1, 2), None

    return AttentionCall(query, key, value, gates, rotations, start, attend=attend, attention_mask=mask)


def with_gradients(name: str, call: AttentionCall) -> dict[str, torch.Tensor]:
    """The output, and the gradients of query, key, value and gates of its sum under fixed weights."""
    names = ("query", "key", "value", "gates")
    leaves = {part: getattr(call, part).detach().requires_grad_() for part in names}
    output, _ = IMPLEMENTATIONS[name].run(dataclasses.replace(call, **leaves))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device)
    grads = dict(zip(names, torch.autograd.grad((output.float() * weight).sum(), leaves.values()), strict=True))
    # Gates of experts that a row did not pick may have a gradient or not.
    return {"output": output.detach(), **grads, "gates": grads["gates"] * call.picks()}


def attention(args: argparse.Namespace) -> Iterator[Figure]:
    for tokens, (shape, (heads, kv_heads, theta)) in itertools.product(args.tokens, SHAPES.items()):
        exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
        frequencies = torch.stack([(multiple * theta) ** -exponents for multiple in RELEASED_MULTIPLIERS])
        rotations = RotationTable(frequencies - frequencies[:1], RotaryLayout(0, HEAD_DIM, False))
        tensors = [
            torch.randn(1, count, tokens, HEAD_DIM, dtype=torch.bfloat16, device=args.device, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]
        logits = torch.randn(1, heads, tokens, NUM_EXPERTS, device=args.device)
        for name, top_k in (("sdpa", 1), *itertools.product(TIMED, (NUM_EXPERTS, 2, 1))):
            gates = select_experts(logits, top_k)
            for job in ("prefill", "decode", "training"):
                run = functools.partial(attend, tensors, gates, rotations, name, job)
                operations = top_k * 2 * heads * HEAD_DIM * tokens**2 if job == "prefill" else 0
                figure = {"shape": shape, "tokens": tokens, "implementation": name, "top_k": top_k, "job": job}
                yield {**figure, **timed(run, args, operations)}


def attend(tensors: list[torch.Tensor], gates: torch.Tensor, rotations: RotationTable, name: str, job: str) -> None:
    query, key, value = tensors
    if job == "decode":
        query, gates = query[:, :, -1:], gates[:, :, -1:]
    with torch.set_grad_enabled(job == "training"):
        if name == "sdpa":
            output, _ = sdpa(query, key, value)
        else:
            start = key.shape[2] - query.shape[2]
            options = {"rotations": rotations, "query_start": start, "attend": sdpa, "implementation": name}
            output, _ = mixed_attention(query, key, value, gates, **options)
    if job == "training":
        output.backward(output)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    is_grouped = query.shape[1] != key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[-2] > 1, enable_gqa=is_grouped
    )
    return output.transpose(1, 2), None


def whole_model(args: argparse.Namespace) -> Iterator[Figure]:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16} if not args.tiny else {}
    sizes = sizes or {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, vocab_size=512, num_attention_heads=sizes["hidden_size"] // 64, num_key_value_heads=1, head_dim=64
    )
    model = LlamaForCausalLM(config).to(args.device, torch.bfloat16).eval()
    names = [("base", model)]
    for top_k in (NUM_EXPERTS, 2, 1):
        adapter = MoICEConfig(task_type="CAUSAL_LM", top_k=top_k, init_weights=False)
        parts = {id(parameter): parameter for parameter in model.parameters()}
        names.append((f"K = {top_k}", get_peft_model(copy.deepcopy(model, parts), adapter).eval()))
    for tokens, (name, variant) in itertools.product(args.tokens, names):
        ids = torch.randint(config.vocab_size, (1, tokens), device=args.device)
        with torch.no_grad():
            cache = variant(input_ids=ids, logits_to_keep=1).past_key_values
            decode = functools.partial(variant, input_ids=ids[:, :1], **{cache_keyword(variant): cache})
            prefill = functools.partial(variant, input_ids=ids, use_cache=False, logits_to_keep=1)
            for job, run in (("decode", decode), ("prefill", prefill)):
                yield {"variant": name, "tokens": tokens, "job": job, **timed(run, args)}


def sanitizer(args: argparse.Namespace) -> Iterator[Figure]:
    if shutil.which("compute-sanitizer") is None:
        yield {"left out": "compute-sanitizer is not installed"}
        return
    small = f"{TESTS / 'test_triton.py'}::TestPrefill"
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds)
    yield {"status": done.returncode, "end": done.stdout.strip().splitlines()[-3:]}


def timed(run: Callable[[], Any], args: argparse.Namespace, operations: float = 0.0) -> Figure:
    """Median milliseconds, peak MiB above what was allocated, and the share of the peak rate of `operations`."""
    times, is_cuda = [], args.device == "cuda"
    try:
        for repetition in range(args.repetitions + 1):
            if is_cuda and repetition == 1:  # the first compiles
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if is_cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    except (RuntimeError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    figure: Figure = {"ms": round(statistics.median(times[1:]), 4)}
    if is_cuda:
        figure["MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        name = torch.cuda.get_device_name()
        peak = next((rate for part, rate in PEAK_TFLOPS.items() if part in name), None)
        if peak is not None and operations:
            figure["share of peak"] = round(operations / figure["ms"] / 1e9 / peak, 3)
    return figure


PARTS = {
    "tests": device_tests,
    "comparison": comparison,
    "attention": attention,
    "whole model": whole_model,
    "sanitizer": sanitizer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="of the comparison")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, HEAD_DIM], help="of the comparison")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=480, help="for everything together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", help='"cpu" tries the script itself')
    parser.add_argument("--tiny", action="store_true", help="a tiny whole model")
    parser.add_argument("--output", type=Path, default=Path("outputs/cuda.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `--device cpu --tiny --tokens 64` tries the script itself.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    with args.output.open("w") as file:

        def show(figure: Figure) -> None:
            line = json.dumps(figure)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        show({"device": device, "torch": torch.__version__, "cuda": torch.version.cuda})
        for name in args.parts:
            args.seconds = max(1, int(end - time.monotonic()))
            try:
                for figure in PARTS[name](args):
                    show({"part": name, **figure})
                    if time.monotonic() > end:
                        raise TimeoutError
            except (TimeoutError, subprocess.TimeoutExpired):
                show({"part": name, "left out": "the rest, for want of time"})


if __name__ == "__main__":
    main()
