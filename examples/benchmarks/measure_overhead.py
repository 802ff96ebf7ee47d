"""What a layer of MoICE adds to a step of decoding besides attention itself: microseconds a layer, on one thread.

    python examples/benchmarks/measure_overhead.py

Decodes after a short prompt, where attention costs least, in the attention shape of SmolLM2-135M (9 heads, 3
key-value heads, head size 64; random weights), with N = 7 rope bases. *Router* is its matrix products, softmax and
choice of experts, *kernel* the call of the C function that attends, both with PyTorch's or C's own calling costs;
*Python above them* is what else the layer adds to the base model's, whose own call of attention is taken off. Lower
quartiles of steps.
"""

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from peft import get_peft_model
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_moice import MoICEConfig
from peft_moice.attention.native import kernel
from peft_moice.evaluation.reader import cache_keyword
from peft_moice.routing.router import MoICERouter

LAYERS, PROMPT, STEPS = 10, 32, 300
TOP_KS = (7, 2, 1)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    base = microseconds(model)
    with timed_attention() as attention:
        microseconds(model)
    print("| | layer | router | kernel | Python above them |\n|---|---|---|---|---|")
    print(f"| base | {base:.0f} | | {quartile(attention):.0f} | |", flush=True)
    for top_k in TOP_KS:
        adapted = get_peft_model(LlamaForCausalLM(config).eval(), MoICEConfig(top_k=top_k)).eval()
        layer = microseconds(adapted)
        router = sum(part(adapted, MoICERouter, name) for name in ("forward", "gates"))
        attend = part(adapted, kernel._Kernel, "run")
        above = layer - router - attend - (base - quartile(attention))
        print(f"| K = {top_k} | {layer:.0f} | {router:.0f} | {attend:.0f} | {above:.0f} |", flush=True)


@torch.no_grad()
def microseconds(model: torch.nn.Module) -> float:
    """Of a step of decoding, per layer."""
    cache = DynamicCache(config=model.config)
    with_cache = {cache_keyword(model): cache}
    model(torch.zeros(1, PROMPT, dtype=torch.long), **with_cache)
    token, seconds = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(token, **with_cache)
        seconds.append(time.perf_counter() - start)
    return quartile(seconds) / LAYERS


def quartile(seconds: list[float]) -> float:
    """The lower one, in microseconds."""
    return 1e6 * statistics.quantiles(seconds, n=4)[0]


def timed(function: Callable, seconds: list[float]) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return wrapper


def part(model: torch.nn.Module, owner: type, name: str) -> float:
    """Microseconds of one call of a method while `model` decodes."""
    function, seconds = getattr(owner, name), []
    setattr(owner, name, timed(function, seconds))
    microseconds(model)
    setattr(owner, name, function)
    return quartile(seconds)


@contextmanager
def timed_attention():
    """Seconds of each call of transformers' sdpa attention function."""
    seconds: list[float] = []
    AttentionInterface.register("sdpa", timed(sdpa_attention_forward, seconds))
    yield seconds
    AttentionInterface.register("sdpa", sdpa_attention_forward)


if __name__ == "__main__":
    main()
