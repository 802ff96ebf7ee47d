"""What trained routers choose, as pictures: expert load per layer and head, gates along a prompt, choices of heads.

    python examples/research/gates.py --model FOLDER --method routers --load FILE --out examples/research/images

`--load` is what `compare.py --save` wrote.
"""

import argparse
import random
from pathlib import Path

import torch
import trained
from forms import table
from methods import METHODS
from methods.routers import EXPERTS
from pictures import plot_choices

from peft_moice.evaluation import gates_along
from peft_moice.evaluation.plotting import plot_expert_load, plot_gates


def main() -> None:
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    parser.set_defaults(method="routers")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    model, tokenizer = trained.load(args)

    shown, pairs = table(random.Random(0), "")
    question, _ = pairs[len(pairs) // 2]
    messages = [{"role": "user", "content": f"{shown}\n\n{question}"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[0]
    gates = torch.stack([*gates_along(model, ids).values()])  # [L, H, S, N]

    experts = EXPERTS[METHODS[args.method][1].get("experts", "angles")]
    names = [f"{angle:g} x own angle" for angle, _ in experts]
    title = "SmolLM2-135M-Instruct, mean over a prompt"
    plot_expert_load(gates.mean(dim=2), names=names, title=title).savefig(args.out / "expert_load.png", dpi=110)
    varies = gates.std(dim=2).sum(dim=-1)  # [L, H]
    layer, head = divmod(int(varies.argmax()), gates.shape[1])
    tokens = [tokenizer.decode([token]).replace("\n", "\\n") for token in ids[-60:]]
    title = f"SmolLM2-135M-Instruct, layer {layer}, head {head}, whose gates vary most over the tokens"
    plot_gates(gates[layer, head, -60:], tokens, names=names, title=title).savefig(args.out / "gates.png", dpi=110)
    choices = gates[layer, :, -60:, 1:].abs()
    title = f"SmolLM2-135M-Instruct, layer {layer}: the angle beside the own one whose gate is farthest from zero"
    plot_choices(choices, tokens, names=names[1:], title=title).savefig(args.out / "choices.png", dpi=110)
    own = gates[..., 0]
    print(f"distance of the own angle's gate from one: mean {(1 - own).abs().mean():.4f}")
    print(f"share of heads whose own gate is above one on average: {(own.mean(dim=-1) > 1).float().mean():.2f}")
    over_tokens = gates.std(dim=2).mean(dim=(0, 1))
    over_heads = gates.mean(dim=2).flatten(0, 1).std(dim=0)
    print(f"standard deviation over tokens, by expert: {[round(x, 4) for x in over_tokens.tolist()]}")
    print(f"standard deviation over heads and layers:  {[round(x, 4) for x in over_heads.tolist()]}")


if __name__ == "__main__":
    main()
