"""Makes examples/data/facts.jsonl: chats about lists of facts, to train routers on.

Each chat shows 30 facts "The access code of NAME is NNNNN." and asks for four of them in turn, at places drawn
uniformly. Names and codes are those of the split "train" of `peft_moice.evaluation`, which shares none with the facts
that `peft-moice measure` asks for.

    python examples/make_facts.py
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from peft_moice.evaluation import sample_facts


@dataclass
class Arguments:
    """How many chats of what size."""

    file: str = field(default="examples/data/facts.jsonl", metadata={"help": "Where to write."})
    chats: int = field(default=40, metadata={"help": "Number of chats."})
    facts: int = field(default=30, metadata={"help": "Facts in a chat, up to 67."})
    questions: int = field(default=4, metadata={"help": "Questions in a chat."})
    seed: int = field(default=0, metadata={"help": "Seed of names, codes and questions."})


def main(args: Arguments) -> None:
    rng = random.Random(args.seed)
    lines = [json.dumps({"messages": chat(args, rng)}) for _ in range(args.chats)]
    Path(args.file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def chat(args: Arguments, rng: random.Random) -> list[dict[str, str]]:
    facts = sample_facts(args.facts, rng, split="train")
    messages = []
    for index in rng.sample(range(args.facts), args.questions):
        question = f"What is the access code of {facts.names[index]}?"
        messages += [
            {"role": "user", "content": question if messages else f"{facts}\n\n{question}"},
            {"role": "assistant", "content": f"The access code of {facts.names[index]} is {facts.codes[index]}."},
        ]
    return messages


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
