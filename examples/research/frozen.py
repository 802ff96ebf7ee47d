"""Does it matter that tokens choose? Trained routers, and their gates frozen to each head's mean, measured alike.

    python examples/research/frozen.py --model FOLDER --data FOLDER --load FILE --out frozen.jsonl

`--load` is what `compare.py --method routers --save` wrote. Means are taken over six prompts like those of training.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from forms import docstrings, draw
from measure import codes, columns, perplexity, score
from methods import METHODS
from models import halve
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moice import MoICELayer
from peft_moice.evaluation import gates_along


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--method", default="routers", choices=METHODS)
    parser.add_argument("--load", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    make, options = METHODS[args.method]
    model = make(model, options).eval()
    saved = torch.load(args.load)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(saved[name])
    halve(model)
    freeze(model, tokenizer)
    record = {
        "method": args.method,
        "frozen": True,
        "codes60": columns(score(model, codes(tokenizer, 6, 60, 4321))),
        "perplexity": perplexity(model, tokenizer, str(args.data / "leval-coursera.jsonl.gz"), 1024, 5),
        "command": "python examples/research/frozen.py --model FOLDER --data FOLDER --load FILE --out FILE",
    }
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def freeze(model: torch.nn.Module, tokenizer) -> None:
    """Replace the gates of every head by their mean."""
    rng, text = random.Random(1000), docstrings()
    sums, tokens = {}, 0
    for _ in range(6):
        prompt = tokenizer.apply_chat_template(draw(rng, text, 1), tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for name, gates in gates_along(model, ids).items():
            sums[name] = sums.get(name, 0.0) + gates.sum(dim=1)
        tokens += len(ids)
    for name, layer in model.named_modules():
        if isinstance(layer, MoICELayer):
            mean = sums[name] / tokens  # [H, N]
            layer.moice_router["default"].gates = lambda logits, top_k, mean=mean: (
                mean[None, :, None].expand(logits.shape).contiguous()
            )


if __name__ == "__main__":
    main()
