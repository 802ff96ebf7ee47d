"""Times a small model's prefill on the CPU beside what estimate_scale.py counts for it.

python examples/benchmarks/measure_scale.py
"""

import statistics
import time

import torch
from estimate_scale import Shape, prefill_operations
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moice import MoICEConfig

SHAPE = Shape("small", layers=2, hidden=512, heads=8, kv_heads=8, head_dim=64, intermediate=1376, vocabulary=512)
MULTIPLIERS = (1.0, 1.75, 1.8, 1.9, 2.0, 2.25, 2.5)
SETTINGS = {"N = 5, K = 2": (5, 2), "N = K = 5": (5, 5), "N = K = 7": (7, 7)}
TOKENS, ROUNDS = 1024, 5


def make_model(setting: tuple[int, int] | None) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
    )
    model = LlamaForCausalLM(config)
    if setting is not None:
        experts, top_k = setting
        model = get_peft_model(
            model, MoICEConfig(base_multipliers=list(MULTIPLIERS[:experts]), top_k=top_k, init_weights=False)
        )
    return model.eval()


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    models = {"base": make_model(None), **{name: make_model(setting) for name, setting in SETTINGS.items()}}
    ids = torch.randint(SHAPE.vocabulary, (1, TOKENS))
    for model in models.values():
        model(ids, use_cache=False, logits_to_keep=1)
    ratios = {name: [] for name in SETTINGS}
    for _ in range(ROUNDS):
        seconds = {}
        for name, model in models.items():  # in turn, so that all see the same machine
            start = time.process_time()
            model(ids, use_cache=False)
            seconds[name] = time.process_time() - start
        for name in SETTINGS:
            ratios[name].append(seconds[name] / seconds["base"])
    print("| setting | counted | measured: median (lowest to highest) |\n|---|---|---|")
    for name, (_, top_k) in SETTINGS.items():
        counted = prefill_operations(SHAPE, TOKENS, top_k) / prefill_operations(SHAPE, TOKENS, 0)
        values = ratios[name]
        print(f"| {name} | {counted:.2f} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


if __name__ == "__main__":
    main()
