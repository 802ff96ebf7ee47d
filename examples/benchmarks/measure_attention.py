"""What attention alone costs on a CPU: our implementations against PyTorch's own attention, in one run.

    python examples/benchmarks/measure_attention.py
    python examples/benchmarks/measure_attention.py --backward --lengths 1024 4096
    python examples/benchmarks/measure_attention.py --compare --lengths 256 1024 4096 16384

The shape is that of a layer of SmolLM2-135M: 9 heads, 3 key-value heads, head size 64; N = 7 angles, the released
ones. Prints a table in Markdown of ratios of the smallest processor time of interleaved repetitions on one thread,
which other programs disturb little.

With `--compare` the columns are implementations, and the last one says what "auto" takes and how much slower that is
than the fastest. `PEFT_MOICE_NATIVE=0` shows the same for a machine without a C compiler.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from peft_moice.attention import mixed_attention
from peft_moice.attention.call import Attend, AttentionCall
from peft_moice.attention.operator import IMPLEMENTATIONS, choose
from peft_moice.rope import RotaryLayout, RotationTable
from peft_moice.routing.router import select_experts
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

HEADS, KV_HEADS, HEAD_DIM, ROPE_THETA = 9, 3, 64, 100000.0
TOP_KS = (7, 2, 1)
COMPARED = ("native", "delegated", "folded")


def rotations() -> RotationTable:
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    frequencies = torch.stack([(ROPE_THETA * multiple) ** -exponents for multiple in RELEASED_MULTIPLIERS])
    return RotationTable(frequencies - frequencies[:1], RotaryLayout(0, HEAD_DIM, False))


def candidates(length: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """One call of each column."""
    query, key, value = tensors(length, length, args)
    table = rotations()

    def finish(output: torch.Tensor) -> None:
        if args.backward:
            output.backward(output)

    def sdpa() -> None:
        attend = torch.nn.functional.scaled_dot_product_attention
        finish(attend(query, key, value, is_causal=True, enable_gqa=True))

    def mixture(top_k: int) -> Callable[[], None]:
        gates = select_experts(torch.randn(1, HEADS, length, len(RELEASED_MULTIPLIERS)), top_k)
        gates.requires_grad_(args.backward)
        options = {"rotations": table, "implementation": "native"}
        return lambda: finish(mixed_attention(query, key, value, gates, **options)[0])

    return {"sdpa": sdpa, **{f"K = {top_k}": mixture(top_k) for top_k in TOP_KS}}


def tensors(queries: int, keys: int, args: argparse.Namespace) -> list[torch.Tensor]:
    shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    dtype = getattr(torch, args.dtype)
    return [torch.randn(1, *shape, HEAD_DIM).to(dtype).requires_grad_(args.backward) for shape in shapes]


def compared(queries: int, keys: int, top_k: int, args: argparse.Namespace) -> str:
    """A row of the table with `--compare`."""
    query, key, value = tensors(queries, keys, args)
    gates = select_experts(torch.randn(1, HEADS, queries, len(RELEASED_MULTIPLIERS)), top_k)
    call = AttentionCall(
        *(query, key, value, gates.requires_grad_(args.backward), rotations(), keys - queries),
        attend=sdpa_of(queries),
        backend="sdpa",
        top_k=top_k,
    )
    fastest: dict[str, float] = {}
    for name in COMPARED:
        if IMPLEMENTATIONS[name].why_not(call) is not None:
            continue

        def run(run: Callable[..., Any] = IMPLEMENTATIONS[name].run) -> None:
            output, _ = run(call)
            if args.backward:
                output.backward(output)

        fastest[name] = min(seconds(run) for _ in range(args.repetitions + 1))
    best, taken = min(fastest.values()), choose(call)[0]
    cells = [f"{fastest[name] * 1000:.1f} ms" if name in fastest else "" for name in COMPARED]
    return " | ".join((f"| {queries:,}", f"{keys:,}", str(top_k), *cells, f"{taken} {fastest[taken] / best:.2f} |"))


def sdpa_of(queries: int) -> Attend:
    """The attention of transformers' sdpa backend, without a module."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, is_causal=queries > 1, enable_gqa=True).transpose(1, 2).contiguous(), None

    return attend


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of the sequence")
    parser.add_argument("--repetitions", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backward", action="store_true", help="with the gradients of everything")
    parser.add_argument("--compare", action="store_true", help='all implementations, and which one "auto" takes')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compare:
        print("| queries | keys | K |", *(f"{name} |" for name in COMPARED), '"auto", times the fastest |')
        print("|---" * (4 + len(COMPARED)) + "|", flush=True)
        for length in args.lengths:
            for queries in (length,) if args.backward else (length, 1):
                for top_k in TOP_KS:
                    print(compared(queries, length, top_k, args), flush=True)
        return
    print("| tokens | sdpa |", *(f"K = {top_k} |" for top_k in TOP_KS))
    print("|---" * (2 + len(TOP_KS)) + "|")
    for length in args.lengths:
        calls = candidates(length, args)
        fastest = dict.fromkeys(calls, math.inf)
        for _ in tqdm(range(args.repetitions), desc=f"{length} tokens", leave=False):
            for name, call in calls.items():
                fastest[name] = min(fastest[name], seconds(call))
        base = fastest.pop("sdpa")
        print(f"| {length:,} | {base:.3f} s |", *(f"{value / base:.2f} |" for value in fastest.values()), flush=True)


if __name__ == "__main__":
    main()
