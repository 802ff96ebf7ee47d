"""Choose base angles for a model.

Two searches: one that looks only at RoPE's attention waveforms, after Attention Buckets (arXiv 2312.04455), and, with
`--model`, one that measures the model under each angle on prompts about a list of facts and picks angles that
complement each other. Prints both choices and draws the waveforms of the first.

    python examples/choose_angles.py --rope_theta 10000 --head_dim 128 --context_length 2048
    python examples/choose_angles.py --model HuggingFaceTB/SmolLM2-135M-Instruct --context_length 1024
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loading import load_model
from transformers import HfArgumentParser

from peft_moice.angles import OwnAngle, own_angles, score_angles, search_angles
from peft_moice.config import RELEASED_MULTIPLIERS
from peft_moice.evaluation import encode_chat, sample_facts
from peft_moice.plotting import plot_waveforms


@dataclass
class Arguments:
    """Whose angles to choose."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model to measure."})
    head_dim: int = field(default=128, metadata={"help": "Rotated dimensions of a head; read from --model if given."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Own angle; read from --model if given."})
    context_length: int = field(default=2048, metadata={"help": "Distances that matter, in tokens."})
    num_experts: int = field(default=7, metadata={"help": "Number of angles, the model's own included."})
    facts: int = field(default=30, metadata={"help": "Facts in a prompt of the measurement."})
    prompts: int = field(default=10, metadata={"help": "Prompts of the measurement."})
    output_dir: str = field(default="outputs/angles", metadata={"help": "Folder for the picture."})


def main(args: Arguments) -> None:
    own, model = [OwnAngle(args.rope_theta, args.head_dim, None)], None
    if args.model is not None:
        model, tokenizer = load_model(args.model)
        own = own_angles(model.eval())
    for angle in own:
        by_waveform(angle, args)
    if model is None:
        return
    if len(own) > 1:
        print("Nothing is measured: the layer types have different angles, and the search varies one scale for all.")
        return
    scores = score_angles(model, lambda candidate: answer_losses(candidate, tokenizer, args))
    for base, losses in zip(scores.rope_bases, scores.losses, strict=True):
        print(f"  {base / own[0].rope_theta:6.2f} times: mean loss {losses.mean():.3f}")
    num_experts = min(args.num_experts, len(scores.rope_bases))
    print(f"By measurement, in the order of their use: {multiples(scores.best(num_experts))}")


def by_waveform(own: OwnAngle, args: Arguments) -> None:
    """Search by waveform, print the choice and draw it."""
    where = "" if own.layer_type is None else f" in layers of type {own.layer_type}"
    angles = search_angles(own.rotary_dim, own.rope_theta, args.context_length, args.num_experts)
    print(
        f"By waveform{where}, over {own.rotary_dim} rotated dimensions: {angles}, times {own.rope_theta:g}: "
        f"{multiples(angles)}"
    )
    if own.rope_theta == 10_000 and args.num_experts == len(RELEASED_MULTIPLIERS):
        released = [multiple * own.rope_theta for multiple in RELEASED_MULTIPLIERS]
        print(f"The official release has {released}; {len({*released} & {*angles})} of {len(angles)} are the same.")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    figure = plot_waveforms(own.rotary_dim, angles[:7], args.context_length)
    name = "waveforms" if own.layer_type is None else f"waveforms_{own.layer_type}"
    figure.savefig(output_dir / f"{name}.png", dpi=150)


def multiples(angles: list[float]) -> list[float]:
    return [round(angle / angles[0], 3) for angle in angles]


def answer_losses(model, tokenizer, args: Arguments) -> list[float]:
    """Loss on the answer to each of the prompts; replace it by your own prompts."""
    losses = []
    rng = random.Random(0)
    for _ in range(args.prompts):
        chat = encode_chat(tokenizer, sample_facts(args.facts, rng), [rng.randrange(args.facts)])
        ids = torch.tensor([chat.input_ids], device=model.device)
        labels = ids.masked_fill(~torch.tensor([chat.is_answer], device=model.device), -100)
        losses.append(model(input_ids=ids, labels=labels).loss.item())
    return losses


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
