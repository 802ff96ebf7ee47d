"""Invented facts of equal form, "The access code of NAME is CODE.", in two halves that have nothing in common.

The task of finding one of them is that of "Lost in the Middle" (Liu et al., TACL 2024), with names and codes in place
of random strings, so that a small chat model can do it at all.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .chats import Chat

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
        return "\n".join(fact_about(name, code) for name, code in zip(self.names, self.codes, strict=True))


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


def _complete(stem: int, split: Split, rng: random.Random) -> str:
    """A fifth digit for four: the sum of all is even for training and odd for evaluation."""
    parity = (sum(map(int, str(stem))) + (split == "eval")) % 2
    return f"{stem}{2 * rng.randrange(5) + parity}"


def chat_about(text: str, facts: FactList, asked: Iterable[int]) -> Chat:
    """A chat that shows a text with `facts` in it, and asks for those at some indices, one after the other."""
    messages = []
    for turn, index in enumerate(asked):
        question = question_about(facts.names[index])
        messages.append({"role": "user", "content": question if turn else f"{text}\n\n{question}"})
        messages.append({"role": "assistant", "content": fact_about(facts.names[index], facts.codes[index])})
    return messages


def fact_about(name: str, code: str) -> str:
    return f"The access code of {name} is {code}."


def question_about(name: str) -> str:
    return f"What is the access code of {name}?"
