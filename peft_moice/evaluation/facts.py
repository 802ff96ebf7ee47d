"""Chats about a list of facts of equal form, of which every question asks for one.

The task is that of "Lost in the Middle" (Liu et al., TACL 2024), with names and codes in place of random strings, so
that a small chat model can do it at all.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..training.data.sequences import check_fast, encode_marked, render_chat
from .task import Example, Scoring, place

NAMES = """
    Abel Ada Agnes Aidan Albert Alice Alma Amos Anita Anna Arthur Audrey August Barbara Basil Beatrice Ben Bianca
    Boris Bruno Caleb Carla Carmen Cecil Celia Clara Colin Conrad Cora Cyrus Dana Daphne David Dennis Diana Dora
    Edgar Edith Elena Elias Ella Emil Emma Eric Esther Eva Felix Fiona Flora Frank Frida Gabriel Gemma George Gloria
    Grace Greta Gustav Hanna Harold Hazel Hector Helen Henry Hilda Hugo Ida Igor Ingrid Irene Isaac Ivan Jacob Jane
    Jasper Joan Jonas Josef Judith Julia Karl Kate Keith Laura Leo Lewis Lily Linda Lucas Lydia Mabel Marcus Maria
    Martha Max Mona Nadia Nathan Nina Noah Nora Olaf Olive Oscar Otto Pablo Paula Peter Phoebe Quentin Rachel Ralph
    Rebecca Rita Robert Rosa Rufus Ruth Samuel Sara Silas Simon Sofia Stella Theo Thomas Tina Ursula Vera Victor
    Viola Walter Wanda Xavier
""".split()  # noqa: SIM905 (a hundred quotes would hide the names)
"""Names that the facts are about."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class FactList:
    """Facts `"The access code of NAME is CODE."`, in the order in which the prompt lists them, which `str` gives.

    Attributes:
        names: of whom, each once.
        codes: five digits each.
    """

    names: tuple[str, ...]
    codes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return "\n".join(_fact(name, code) for name, code in zip(self.names, self.codes, strict=True))


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a chat, and for each of them whether it belongs to a code that the assistant answers with."""

    input_ids: list[int]
    is_answer: list[bool]


class Facts:
    """Asks for the code of one name of a list.

    Args:
        split: see [`sample_facts`]. Default: "eval".
    """

    name = "facts"
    unit = "facts"
    scoring: Scoring = "exact"

    def __init__(self, split: Split = "eval"):
        self.split = split

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """See [`Task.draw`]."""
        facts = sample_facts(length, rng, self.split)
        examples = []
        for position in positions:
            name, code = (values[place(position, length)] for values in (facts.names, facts.codes))
            opening = _fact(name, "").rstrip(".")
            examples.append(Example(f"{facts}\n\n{_question(name)}", (code,), position, length, opening))
        return examples


def sample_facts(num_facts: int, rng: random.Random, split: Split = "eval") -> FactList:
    """Draw a list of facts.

    Args:
        num_facts: number of facts, 1 to half the number of [`NAMES`].
        rng: source of randomness.
        split: "train" and "eval" have no name and no code in common. Default: "eval".

    Raises:
        ValueError: a value out of its range.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"`split` is {split!r}; choose 'train' or 'eval'.")
    names = NAMES[("train", "eval").index(split) :: 2]
    if not 1 <= num_facts <= len(names):
        raise ValueError(f"`num_facts` is {num_facts}, but has to lie in 1..{len(names)}, the number of names.")
    codes = [_complete(stem, split, rng) for stem in rng.sample(range(1_000, 10_000), num_facts)]
    return FactList(tuple(rng.sample(names, num_facts)), tuple(codes))


def encode_chat(tokenizer: Any, facts: FactList, asked: list[int]) -> EncodedChat:
    """Encode a chat that shows all `facts` and then asks for those at the indices `asked`, one after the other.

    Chats about the same facts begin with the same tokens. The tokenizer's chat template is used if it has one.

    Args:
        tokenizer: a fast tokenizer (codes are found again among the tokens by their characters).
        facts: the facts to show.
        asked: indices of the facts to ask for, at least one.

    Raises:
        ValueError: the tokenizer is a slow one, its chat template refuses the chat, or nothing is asked.
        IndexError: there is no fact at an index.
    """
    check_fast(tokenizer)
    if not asked:
        raise ValueError("`asked` is empty; name at least one fact.")
    messages = []
    for turn, index in enumerate(asked):
        question = _question(facts.names[index])
        messages.append({"role": "user", "content": question if turn else f"{facts}\n\n{question}"})
        messages.append({"role": "assistant", "content": _fact(facts.names[index], facts.codes[index])})
    text = render_chat(tokenizer, messages)
    spans, end = [], 0
    for index in asked:
        question = _question(facts.names[index])
        start = text.index(facts.codes[index], text.index(question, end) + len(question))
        end = start + len(facts.codes[index])
        spans.append((start, end))
    return EncodedChat(*encode_marked(tokenizer, text, spans))


def _complete(stem: int, split: Split, rng: random.Random) -> str:
    """A fifth digit for four: the sum of all is even for training and odd for evaluation."""
    parity = (sum(map(int, str(stem))) + (split == "eval")) % 2
    return f"{stem}{2 * rng.randrange(5) + parity}"


def _fact(name: str, code: str) -> str:
    return f"The access code of {name} is {code}."


def _question(name: str) -> str:
    return f"What is the access code of {name}?"
