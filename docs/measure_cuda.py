"""Times one layer's attention on a GPU, with the Triton kernels and without: prefill, training and decoding.

This script has not been run yet: no GPU was at hand.

python docs/measure_cuda.py
python docs/measure_cuda.py --tokens 4096 --implementations triton
"""

import argparse
import statistics
import time

import torch

from peft_moice.attention import mixed_attention
from peft_moice.rope import RotaryLayout, RotationTable
from peft_moice.router import select_experts

HEADS = {"Llama-2-7B": (32, 32, 10000.0), "Llama-3-8B": (32, 8, 500000.0)}
"""Query heads, key-value heads, rope_theta; all heads have 128 dimensions."""
HEAD_SIZE = 128
MULTIPLIERS = (1.0, 1.75, 1.8, 1.9, 2.0, 2.25, 2.5)
ROUNDS = 10


def sdpa(query, key, value, attention_mask=None, **kwargs):
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[-2] > 1, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2), None


def make_rotations(rope_theta: float) -> RotationTable:
    pairs = torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE
    frequencies = torch.stack([(multiplier * rope_theta) ** -pairs for multiplier in MULTIPLIERS])
    return RotationTable(frequencies - frequencies[0], RotaryLayout(0, HEAD_SIZE, False))


def milliseconds(function, device: str) -> float:
    """Median of several runs after two to warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(model: str, tokens: int, implementations: list[str], device: str = "cuda") -> None:
    """Print a row per implementation and number of experts."""
    heads, kv_heads, rope_theta = HEADS[model]
    rotations = make_rotations(rope_theta)
    options = {"dtype": torch.bfloat16, "device": device}
    query = torch.randn(1, heads, tokens, HEAD_SIZE, **options)
    key, value = (torch.randn(1, kv_heads, tokens, HEAD_SIZE, **options) for _ in range(2))
    weight = torch.randn(1, tokens, heads, HEAD_SIZE, **options)
    logits = torch.randn(1, heads, tokens, len(MULTIPLIERS), device=device)

    def mixed(implementation: str, top_k: int):
        gates = select_experts(logits, top_k)

        def attend(q, k, v, gates=gates):
            start = k.shape[-2] - q.shape[-2]
            gates = gates[:, :, start:]
            return mixed_attention(
                q, k, v, gates, rotations=rotations, query_start=start, attend=sdpa, implementation=implementation
            )[0]

        return attend

    variants = {"sdpa, one angle": lambda q, k, v: sdpa(q, k, v)[0]}
    for name in implementations:
        variants |= {f"{name}, N = 7, K = {top_k}": mixed(name, top_k) for top_k in (2, 7)}
    for name, attend in variants.items():

        def training_step(attend=attend):
            tensors = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            (attend(*tensors) * weight).sum().backward()

        with torch.no_grad():
            prefill = milliseconds(lambda attend=attend: attend(query, key, value), device)
            decoding = milliseconds(lambda attend=attend: attend(query[:, :, -1:], key, value), device)
        training = milliseconds(training_step, device)
        print(f"| {model} | {tokens:,} | {name} | {prefill:.2f} | {training:.2f} | {decoding:.3f} |", flush=True)
    if {"triton", "delegated"} <= set(implementations):
        with torch.no_grad():
            outputs = [mixed(name, 2)(query, key, value).float() for name in ("triton", "delegated")]
        print(f"largest difference of triton and delegated: {(outputs[0] - outputs[1]).abs().max().item():.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--implementations", nargs="+", default=["delegated", "triton"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", "one layer, bfloat16, batch of 1")
    print("| model | tokens | attention | prefill ms | forward and backward ms | one token ms |")
    print("|---|---|---|---|---|---|")
    for model in HEADS:
        for tokens in args.tokens:
            measure(model, tokens, args.implementations)


if __name__ == "__main__":
    main()
