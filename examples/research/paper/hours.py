"""Hours and memory by calculation, for one GPU of 80 GB; nothing is run."""

from typing import Any

import answer
from estimate_scale import (
    GIB,
    Shape,
    cache,
    checkpoints,
    prefill_operations,
    saved_by_mixing,
    table,
    training_operations,
)

PEAK, BANDWIDTH, SHARE = 312e12, 2.0e12, 0.4
"""bfloat16 operations and bytes a second of an A100 with 80 GB, and the share of the first that is assumed."""
SEQUENCES, LENGTH, EXPERTS = 7 * 128, 4608, 7


def shape_of(config: Any) -> Shape:
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = (config.num_hidden_layers, config.hidden_size, heads, config.num_key_value_heads, dim)
    return Shape("", *sizes, config.intermediate_size, config.vocab_size)


def memory(shape: Shape, tokens: int, experts: int) -> float:
    """GiB of a training step: layers' inputs, one layer's mixture, logits in float32 with their gradient, and weights
    twice, since a model may lie there until the next one has been loaded.
    """
    held = 4 * shape.weights + checkpoints(shape, tokens) + saved_by_mixing(shape, tokens, experts)
    return (held + 8 * tokens * shape.vocabulary) / GIB


def answer_hours(shape: Shape, window: int) -> dict[str, float]:
    """Of the parts of `answer`: routers and LoRA at three rates each; three models read, and write, all tasks."""
    tokens = answer.JOINED * 500
    # The kept text is about a tenth more, and read once more by the base model; what is held out is read only.
    prompts = len(answer.METHODS["lora"][2]) * (1.2 * answer.PROMPTS + answer.HELD_OUT / 3)
    trained = sum(prompts * training_operations(shape, tokens, experts) for experts in (2, 1))
    read = written = 0.0
    places = len(answer.POSITIONS)
    for length in answer.LENGTHS:
        ropes = 2 if length > window else 1
        for experts in (1, 2, 1):
            # JSON and codes are read once for all positions, needles for each.
            read += answer.GROUPS * (2 + 2 * places) * prefill_operations(shape, length, experts * ropes)
            written += answer.GROUPS * places * answer.WRITTEN
    step = 2 * (2 * shape.weights + cache(shape, answer.LENGTHS[-1])) / BANDWIDTH  # twice the time of the bytes
    seconds = {"training": trained / PEAK / SHARE, "reading": read / PEAK / SHARE, "writing": written * step}
    return {name: value / 3600 for name, value in seconds.items()}


def report(shape: Shape, window: int) -> str:
    """A table of what takes how long."""
    released = SEQUENCES * training_operations(shape, LENGTH, EXPERTS) / PEAK / SHARE / 3600
    rows = [["training of the release, N = K = 7", f"{released:.1f}", f"{memory(shape, LENGTH, EXPERTS):.0f}"]]
    parts = answer_hours(shape, window)
    tokens = answer.LENGTHS[-1]
    inference = (4 * shape.weights + cache(shape, tokens)) / GIB
    held = max(memory(shape, answer.JOINED * 500, 2), inference)
    rows += [[f"answer: {name}", f"{value:.1f}", ""] for name, value in parts.items()]
    rows += [["answer", f"{sum(parts.values()):.1f}", f"{held:.0f}"]]
    said = f"By calculation: {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12:.0f} TB/s; not measured."
    return f"{table(['what', 'hours', 'GiB'], rows)}\n\n{said}\n"
