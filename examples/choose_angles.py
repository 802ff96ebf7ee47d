"""Choose base angles for a model by measuring it on prompts of your own kind.

The calls behind `peft-moice angles`, which also searches by RoPE's waveforms alone: runs the model under one base
angle after the other, and picks angles that complement each other. Replace `losses_of` by losses on your own prompts.

    python examples/choose_angles.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import random
from dataclasses import dataclass, field

import torch
from loading import load_model
from transformers import HfArgumentParser

from peft_moice.evaluation import encode_chat, sample_facts
from peft_moice.evaluation.angles import score_angles


@dataclass
class Arguments:
    """Whose angles to choose."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id. Default: SmolLM2-135M-Instruct."})
    multipliers: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0], metadata={"help": "Candidates."}
    )
    num_experts: int = field(default=5, metadata={"help": "Number of angles, the model's own included."})
    facts: int = field(default=30, metadata={"help": "Facts in a prompt."})
    prompts: int = field(default=10, metadata={"help": "Prompts."})


def main(args: Arguments) -> None:
    model, tokenizer = load_model(args.model)

    def losses_of(candidate) -> list[float]:
        """Loss on the answer to each of the prompts."""
        rng, losses = random.Random(0), []
        for _ in range(args.prompts):
            chat = encode_chat(tokenizer, sample_facts(args.facts, rng), [rng.randrange(args.facts)])
            ids = torch.tensor([chat.input_ids])
            labels = ids.masked_fill(~torch.tensor([chat.is_answer]), -100)
            losses.append(candidate(input_ids=ids, labels=labels).loss.item())
        return losses

    scores = score_angles(model.eval(), losses_of, args.multipliers)
    own = scores.rope_bases[0]
    for base, losses in zip(scores.rope_bases, scores.losses, strict=True):
        print(f"{base / own:6.2f} times: mean loss {losses.mean():.3f}")
    print(f"In the order of their use: {[round(base / own, 3) for base in scores.best(args.num_experts)]}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
