"""Small files to train on, in every format."""

import json
import random
from pathlib import Path

from tiny_models import VOCABULARY

TEMPLATE = "{% for m in messages %}{{ 'w2 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} w4 {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}w3 {% endif %}"


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(5, VOCABULARY)}" for _ in range(count))


def pairs(seed: int = 0) -> list[tuple[str, str]]:
    """12 prompts of 4 to 8 words, with answers of 3."""
    rng = random.Random(seed)
    return [(words(rng, 4 + index % 5), words(rng, 3)) for index in range(12)]


def records(data_format: str, seed: int = 0) -> list[dict]:
    """The same chats as records of a format."""
    return [_RECORDS[data_format](prompt, answer) for prompt, answer in pairs(seed)]


def write_data(folder: Path, data_format: str, seed: int = 0) -> str:
    """A file of 12 chats, or of 40 sentences of 8 words."""
    if data_format in ("text", "documents"):
        rng, file = random.Random(seed), folder / f"{data_format}{seed}.txt"
        file.write_text("\n".join(words(rng, 8) + " ." for _ in range(40)))
    else:
        file = folder / f"{data_format}{seed}.jsonl"
        file.write_text("\n".join(map(json.dumps, records(data_format, seed))) + "\n")
    return str(file)


def _messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


_TURNS = _messages("w9", "w10 w11")
_RECORDS = {
    "messages": lambda prompt, answer: {"messages": [*_messages(prompt, answer), *_TURNS]},
    "prompt_answer": lambda prompt, answer: {"prompt": prompt, "answer": answer},
    "sharegpt": lambda prompt, answer: {
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    },
    "alpaca": lambda prompt, answer: {"instruction": prompt, "input": "", "output": answer},
}
