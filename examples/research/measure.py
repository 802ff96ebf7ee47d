"""What is measured after training: three tasks whose forms no training prompt has, and the perplexity of a course."""

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from forms import FIRST, LAST
from transformers import DynamicCache

from peft_moice.evaluation import FactList, encode_chat, sample_facts
from peft_moice.evaluation.reader import cache_keyword

MIN_READ = 9
"""Tokens that a continued pass reads at least: experimental operators are served by the path of long passes."""

PAPER_PROMPT = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might "
    "be irrelevant)."
)


def chat(tokenizer, prompt: str, answer: str, quote: str = "") -> tuple[list[int], list[int]]:
    """Token ids, and the indices of those of the answer, which may stand in quotes."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": quote + answer + quote}]
    start = len(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) + quote)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = start + len(answer)
    places = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and start < b]
    return encoded["input_ids"], places


class Reader:
    """Reads token sequences one after the other, and of each only what the one before did not begin with."""

    def __init__(self, model):
        self.model, self.ids, self.cache = model, [], DynamicCache(config=model.config)

    @torch.no_grad()
    def logits(self, ids: list[int], first: int) -> torch.Tensor:
        """Logits that predict the tokens from index `first` on, `[len(ids) - first, vocabulary]`."""
        shared = 0
        for a, b in zip(self.ids, ids[: min(first - 1, len(ids) - MIN_READ)], strict=False):
            if a != b:
                break
            shared += 1
        if len(self.ids) > shared:
            self.cache.crop(shared - len(self.ids))
        inputs, with_cache = torch.tensor([ids[shared:]]), {cache_keyword(self.model): self.cache}
        out = self.model(input_ids=inputs, logits_to_keep=len(ids) - first + 1, **with_cache)
        self.ids = ids
        return out.logits[0, :-1].float()


def score(model, groups: list[list[tuple[list[int], list[int]]]]) -> list[list[dict[str, float]]]:
    """Loss, share of tokens and whole answer right, of each chat of each group; a group shares its beginnings."""
    results = []
    for group in groups:
        reader, row = Reader(model), []
        for ids, places in group:
            logits = reader.logits(ids, places[0])
            logits = logits[[place - places[0] for place in places]]
            target = torch.tensor(ids)[places]
            hits = logits.argmax(-1) == target
            row.append(
                {
                    "loss": torch.nn.functional.cross_entropy(logits, target).item(),
                    "tokens": hits.float().mean().item(),
                    "right": float(hits.all()),
                }
            )
        results.append(row)
    return results


def columns(results: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """Means over groups, by position and over all."""
    out = {}
    for name in ("right", "tokens", "loss"):
        by_position = [sum(row[c][name] for row in results) / len(results) for c in range(len(results[0]))]
        out[name] = [round(x, 4) for x in by_position]
        out[f"{name}_mean"] = round(sum(by_position) / len(by_position), 4)
    return out


def json_pairs(tokenizer, objects: int, pairs: int, seed: int):
    """JSON objects of hexadecimal keys and values, as in "Lost in the Middle", with 8 digits for 32."""
    rng = random.Random(seed)
    groups = []
    for _ in range(objects):
        items = [(f"{rng.getrandbits(32):08x}", f"{rng.getrandbits(32):08x}") for _ in range(pairs)]
        shown = "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in items) + "}"
        group = []
        for place in (0, 0.25, 0.5, 0.75, 1):
            key, value = items[round(place * (pairs - 1))]
            prompt = (
                "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
                f'{shown}\n\nKey: "{key}"\nCorresponding value:'
            )
            group.append(chat(tokenizer, prompt, value, quote='"'))
        groups.append(group)
    return groups


def natural_questions(tokenizer, file: Path, questions: int, passages: int, seed: int):
    """The paper's prompt; the gold passage last, in the middle, first among passages of other questions."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng = random.Random(seed)
    groups = []
    for row in rng.sample(rows, questions):
        others = []
        while len(others) < passages - 1:
            passage = rng.choice(rows)["ctxs"][0]
            if not any(answer.lower() in passage["text"].lower() for answer in row["answers"]):
                others.append(passage)
        group = []
        for place in (passages - 1, passages // 2, 0):  # later ones first: beginnings are shared
            shown = [*others[:place], row["ctxs"][0], *others[place:]]
            shown = [f"Document [{i}](Title: {p['title']}) {p['text']}" for i, p in enumerate(shown, start=1)]
            prompt = f"{PAPER_PROMPT}\n\n" + "\n".join(shown) + f"\n\nQuestion: {row['question']}\nAnswer:"
            group.append(chat(tokenizer, prompt, row["answers"][0]))
        groups.append(group)
    return groups


def codes(tokenizer, lists: int, facts: int, seed: int):
    """The lists of access codes that the package's demo measures."""
    rng = random.Random(seed)
    groups = []
    for _ in range(lists):
        drawn = sample_facts(facts, rng)
        groups.append(asked_everywhere(tokenizer, drawn))
    return groups


def long_codes(tokenizer, lists: int, facts: int, seed: int):
    """Likewise with first and last names, of which there are enough for long lists."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    groups = []
    for _ in range(lists):
        drawn = FactList(
            tuple(rng.sample(names, facts)), tuple(str(code) for code in rng.sample(range(10_000, 100_000), facts))
        )
        groups.append(asked_everywhere(tokenizer, drawn))
    return groups


def asked_everywhere(tokenizer, facts: FactList) -> list[tuple[list[int], list[int]]]:
    """One chat for each position of the asked fact: its token ids, and the places of the answer."""
    group = []
    for place in (0, 0.25, 0.5, 0.75, 1):
        encoded = encode_chat(tokenizer, facts, [round(place * (len(facts) - 1))])
        group.append((encoded.input_ids, [i for i, is_answer in enumerate(encoded.is_answer) if is_answer]))
    return group


@torch.no_grad()
def perplexity(model, tokenizer, file: Path, length: int, chunks: int) -> float:
    """Of the first document of an L-Eval file, read in chunks."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        text = json.loads(lines.readline())["input"]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: length * chunks]
    loss = 0.0
    for chunk in ids.view(chunks, length):
        logits = model(input_ids=chunk[None], use_cache=False).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, chunk[1:]).item()
    return math.exp(loss / chunks)


TASKS = ("json", "nq", "codes30", "codes60", "codes120", "perplexity")


def measure(model, tokenizer, data: Path | None, seed: int = 4321, tasks: Sequence[str] = TASKS) -> dict:
    """`tasks`, for one model. `data` is what `nq` and `perplexity` read."""
    model.eval()
    prompts = {
        "json": lambda: json_pairs(tokenizer, 12, 16, seed),
        "nq": lambda: natural_questions(tokenizer, data / "nq-open-oracle.jsonl.gz", 12, 6, seed),
        "codes30": lambda: codes(tokenizer, 6, 30, seed),
        "codes60": lambda: codes(tokenizer, 6, 60, seed),
        "codes120": lambda: long_codes(tokenizer, 4, 120, seed),
    }
    results = {name: columns(score(model, prompts[name]())) for name in TASKS if name in tasks and name in prompts}
    if "nq" in results:
        for name in ("right", "tokens", "loss"):
            results["nq"][name] = results["nq"][name][::-1]  # by position again
    if "perplexity" in tasks:
        results["perplexity"] = perplexity(model, tokenizer, data / "leval-coursera.jsonl.gz", 1024, 5)
    return results
