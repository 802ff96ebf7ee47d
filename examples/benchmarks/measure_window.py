"""What does it cost to read beyond the window? Times of the extension beside a model under static YaRN, and its base.

    python examples/benchmarks/measure_window.py
    python examples/benchmarks/measure_window.py --window 2048 --implementation delegated --shape llama-1b

Layers of a model's shape with random weights, float32. The window is set by --window, so that a text of twice its
length is read in seconds. Medians of repetitions that take turns; the ratios are to YaRN.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from peft_moice import MoICEConfig
from peft_moice.evaluation.reader import cache_keyword
from peft_moice.tuner.extending import extension_config

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # A few layers with the vocabulary of all sixteen would measure its head.
    "llama-1b": {
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    models = {"base": make(args), "YaRN": make(args, factor=4.0), "extend": extended(args)}
    ids = torch.randint(0, 1000, (1, 2 * args.window))
    print(
        f"{args.shape}, window {args.window}, {args.layers} layers, {args.threads} threads, torch {torch.__version__}"
    )
    print("| | base | YaRN | extend | extend to YaRN |\n|---|---|---|---|---|")
    half = ids[:, : args.window]
    show(f"prefill of {args.window} tokens, within", timed(models, lambda model: read(model, half), args))
    show(f"prefill of {2 * args.window} tokens", timed(models, lambda model: read(model, ids), args))
    caches = {name: read(model, ids) for name, model in models.items()}

    def step(name: str) -> None:
        models[name](ids[:, :1], **{cache_keyword(models[name]): caches[name]})
        caches[name].crop(-1)

    many = argparse.Namespace(repetitions=10 * args.repetitions)
    show(f"decode step, {2 * args.window} cached tokens", timed({name: name for name in models}, step, many))


def make(args: argparse.Namespace, factor: float | None = None):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    if factor is not None:
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": args.window}
    sizes = {"num_hidden_layers": args.layers, "max_position_embeddings": args.window}
    config = LlamaConfig(**SHAPES[args.shape], **sizes, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config, attn_implementation=args.attention).eval()


def extended(args: argparse.Namespace):
    from peft import get_peft_model

    model = make(args)
    config = extension_config(model.config, 4.0)
    config = MoICEConfig(ropes=config.ropes, implementation=args.implementation)
    return get_peft_model(model, config).get_base_model()


@torch.no_grad()
def read(model, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, logits_to_keep=1, **{cache_keyword(model): cache})
    return cache


@torch.no_grad()
def timed(models: dict, run, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each repetition, by model; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repetition in range(args.repetitions + 1):
        for name, model in models.items():
            started = time.perf_counter()
            run(model)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(what: str, seconds: dict[str, list[float]]) -> None:
    base, yarn, extend = (statistics.median(seconds[name]) for name in ("base", "YaRN", "extend"))
    print(f"| {what} | {base:.3f} s | {yarn:.3f} s | {extend:.3f} s | {extend / yarn:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--implementation", default="auto")
    main(parser.parse_args())
