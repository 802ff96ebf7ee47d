"""Retrieval questions made up about documents: they need no labels, and ask for every place equally often."""

import random
import re
from collections.abc import Iterator, Sequence

from .arguments import DataArguments
from .chats import Chat
from .facts import NAMES, FactList, chat_about, fact_about, sample_facts
from .sources import read_text

_FACTS = 3
"""Hidden in a passage, where there are names enough."""
_MOST = len(NAMES) // 2
"""Facts of a prompt."""
_LONGEST = 75
"""Words of a sentence that is kept however short passages are."""


def document_chats(files: Sequence[str], args: DataArguments, seed: int) -> Iterator[tuple[str, Chat]]:
    """Chats that show passages of `files` with invented facts between their sentences, and ask for some of the facts.

    Over as many chats in a row as a prompt has facts, every place is asked for equally often. Names and codes are
    those of the training half, see [`sample_facts`].

    Args:
        files: of text.
        args: how many passages, questions and prompts; its own files are not looked at.
        seed: of the passages and facts.

    Raises:
        ValueError: a value out of its range, or too little text.
    """
    for name in ("passage_words", "prompts"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, but has to be at least 1.")
    number = args.documents_per_prompt
    if not 1 <= number <= _MOST:
        raise ValueError(f"documents_per_prompt is {number}, but has to lie in 1..{_MOST}.")
    per_passage = min(_FACTS, _MOST // number)
    num_facts = number * per_passage
    if not 1 <= args.questions <= num_facts:
        raise ValueError(
            f"questions is {args.questions}, but has to lie in 1..{num_facts}, the number of facts in "
            f"documents_per_prompt {number}."
        )
    passages = [passage for file in files for passage in _read_passages(file, args.passage_words)]
    if len(passages) < number:
        raise ValueError(
            f"{', '.join(files)}: {len(passages)} passages of {args.passage_words} words, too few for "
            f"documents_per_prompt {number}. Give more text, or lower one of the two."
        )
    rng = random.Random(seed)
    for index in range(args.prompts):
        facts = sample_facts(num_facts, rng, split="train")
        documents = []
        for i, sentences in enumerate(rng.sample(passages, number)):
            hidden = range(i * per_passage, (i + 1) * per_passage)
            documents.append(f"Document {i + 1}: {_with_facts(sentences, facts, hidden, rng)}")
        asked = [(index + turn * num_facts // args.questions) % num_facts for turn in range(args.questions)]
        yield f"prompt {index} made of {', '.join(files)}", chat_about("\n\n".join(documents), facts, asked)


def _with_facts(sentences: list[str], facts: FactList, hidden: Sequence[int], rng: random.Random) -> str:
    """A passage with some facts, in their order, at random places between its sentences."""
    shown = list(sentences)
    places = sorted(rng.randint(0, len(sentences)) for _ in hidden)
    for place, i in reversed(list(zip(places, hidden, strict=True))):
        shown.insert(place, fact_about(facts.names[i], facts.codes[i]))
    return " ".join(shown)


def _read_passages(file: str, words: int) -> list[list[str]]:
    """Disjoint passages of a text, as lists of sentences.

    Passages end before they are longer than `words` and a quarter. Longer sentences stand alone; still longer ones,
    such as tables, are left out.
    """
    most = 1.25 * words
    passages: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", read_text(file)):
        sentence = " ".join(sentence.split())
        if not sentence or _length(sentence) > max(most, _LONGEST):
            continue
        length = sum(map(_length, passages[-1]))
        if length >= words or length + _length(sentence) > most:
            passages.append([])
        passages[-1].append(sentence)
    return [passage for passage in passages if passage]


def _length(sentence: str) -> float:
    """In words; those of text that is no prose, or has no spaces, are of six bytes."""
    return max(len(sentence.split()), len(sentence.encode()) / 6)
