"""What a step of decoding costs with a static cache, compiled and not: K = N = 7 against the base model.

    python examples/benchmarks/measure_compiled.py

The model has two layers in the shape of SmolLM2-135M's, and random weights. Prints a table in Markdown of the shortest
of some steps. *delegated* is what "auto" takes in a graph where the kernels in C cannot be had.
"""

import argparse
import copy
import time

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from peft_moice import MoICEConfig
from peft_moice.evaluation.reader import cache_keyword

PROMPT, STEPS = 16, 12


def milliseconds(model: nn.Module, places: int, is_compiled: bool) -> float:
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=places)
    ids = torch.zeros(1, PROMPT, dtype=torch.long)
    with_cache = {cache_keyword(model): cache}
    model(ids, position_ids=torch.arange(PROMPT)[None], **with_cache)
    step, shortest = torch.compile(model, fullgraph=True) if is_compiled else model, float("inf")
    for position in range(PROMPT, PROMPT + STEPS):
        start = time.perf_counter()
        step(ids[:, :1], position_ids=torch.tensor([[position]]), **with_cache)
        shortest = min(shortest, time.perf_counter() - start)
    return 1000 * shortest


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, nargs="+", default=[2048, 8192], help="of the static cache")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 64}
    config = LlamaConfig(
        **sizes, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=max(args.places)
    )
    base = LlamaForCausalLM(config).eval()

    def mixture(implementation: str) -> nn.Module:
        adapter = MoICEConfig(task_type="CAUSAL_LM", init_weights=False, implementation=implementation)
        return get_peft_model(copy.deepcopy(base), adapter).eval()

    models = {"base": base, "K = N = 7": mixture("auto"), "delegated": mixture("delegated")}
    print("| places | model | as it is | compiled |\n|---|---|---|---|", flush=True)
    for places in args.places:
        for name, model in models.items():
            times = " | ".join(f"{milliseconds(model, places, is_compiled):.1f} ms" for is_compiled in (False, True))
            print(f"| {places:,} | {name} | {times} |", flush=True)


if __name__ == "__main__":
    main()
