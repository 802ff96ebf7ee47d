"""What attention alone costs on a CPU: `native` and `grouped` against PyTorch's own attention, in one run.

    python docs/measure_attention.py
    python docs/measure_attention.py --backward --lengths 1024 4096

The shape is that of a layer of SmolLM2-135M: 9 heads, 3 key-value heads, head size 64; N = 7 angles, the released
ones. Prints a table in Markdown of ratios of the smallest processor time of interleaved repetitions on one thread,
which other programs disturb little.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from peft_moice.attention import mixed_attention
from peft_moice.config import RELEASED_MULTIPLIERS
from peft_moice.rope import RotaryLayout, RotationTable
from peft_moice.router import select_experts

HEADS, KV_HEADS, HEAD_DIM, ROPE_THETA = 9, 3, 64, 100000.0
TOP_KS = (7, 2, 1)


def rotations() -> RotationTable:
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    frequencies = torch.stack([(ROPE_THETA * multiple) ** -exponents for multiple in RELEASED_MULTIPLIERS])
    return RotationTable(frequencies - frequencies[:1], RotaryLayout(0, HEAD_DIM, False))


def candidates(length: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """One call of each column."""
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM).to(getattr(torch, args.dtype)).requires_grad_(args.backward)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
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
        options = {"rotations": table, "implementation": args.implementation}
        return lambda: finish(mixed_attention(query, key, value, gates, **options)[0])

    return {"sdpa": sdpa, **{f"K = {top_k}": mixture(top_k) for top_k in TOP_KS}}


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of the sequence")
    parser.add_argument("--repetitions", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--implementation", default="native", choices=["native", "grouped"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backward", action="store_true", help="with the gradients of everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
