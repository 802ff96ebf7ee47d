"""Retrieval questions made up about documents: they need no labels, and ask for every place equally often."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from .arguments import DataArguments
from .chats import Chat
from .sources import read_text

_OPENING_WORDS = 4
"""Words of a sentence that a question quotes."""
_MAX_WORDS = 60


def document_chats(files: Sequence[str], args: DataArguments, seed: int) -> Iterator[tuple[str, Chat]]:
    """Chats that show passages of `files` and ask for sentences of them, and where they come from.

    Over `documents_per_prompt` chats in a row, every place in the prompt is asked for equally often.

    Args:
        files: of text.
        args: how many passages, questions and prompts; its own files are not looked at.
        seed: of the passages and questions.

    Raises:
        ValueError: a value out of its range, or too little text.
    """
    for name in ("documents_per_prompt", "passage_words", "prompts"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, but has to be at least 1.")
    number = args.documents_per_prompt
    if not 1 <= args.questions <= number:
        raise ValueError(f"questions is {args.questions}, but has to lie in 1..{number}, documents_per_prompt.")
    passages = [passage for file in files for passage in _read_passages(file, args.passage_words)]
    if len(passages) < number:
        raise ValueError(
            f"{', '.join(files)}: {len(passages)} passages of {args.passage_words} words with a sentence to ask for, "
            f"too few for documents_per_prompt {number}. Give more text, or lower one of the two."
        )
    rng = random.Random(seed)
    for index in range(args.prompts):
        places = [(index + turn * number // args.questions) % number for turn in range(args.questions)]
        for _ in range(100):
            shown = rng.sample(passages, number)
            askable = [_unique_sentences(shown, place) for place in places]
            if all(askable):
                break
        else:
            raise ValueError(
                f"{', '.join(files)}: passages repeat each other, so questions would be ambiguous. Give other text."
            )
        prompt = "\n\n".join(f"Document {i + 1}: {' '.join(sentences)}" for i, sentences in enumerate(shown))
        messages = []
        for turn, sentences in enumerate(askable):
            answer = rng.choice(sentences)
            question = f'Repeat the sentence that starts with "{_opening(answer)}".'
            messages.append({"role": "user", "content": question if turn else f"{prompt}\n\n{question}"})
            messages.append({"role": "assistant", "content": answer})
        yield f"prompt {index} made of {', '.join(files)}", messages


def _read_passages(file: str, words: int) -> list[list[str]]:
    """Disjoint passages of a text, as lists of sentences, one of them at least long enough to be asked for.

    Passages end before they are longer than `words` and a quarter. What is longer by itself, and too long to ask for,
    such as a table, is left out.
    """
    most = 1.25 * words
    passages: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", read_text(file)):
        sentence = " ".join(sentence.split())
        if not sentence or _length(sentence) > max(most, 1.25 * _MAX_WORDS):
            continue
        length = sum(map(_length, passages[-1]))
        if length >= words or length + _length(sentence) > most:
            passages.append([])
        passages[-1].append(sentence)
    return [passage for passage in passages if any(map(_is_askable, passage))]


def _length(sentence: str) -> float:
    """In words; those of text that is no prose, or has no spaces, are of six bytes."""
    return max(len(sentence.split()), len(sentence.encode()) / 6)


def _is_askable(sentence: str) -> bool:
    return _OPENING_WORDS + 2 <= len(sentence.split()) <= _MAX_WORDS


def _opening(sentence: str) -> str:
    return " ".join(sentence.split()[:_OPENING_WORDS])


def _unique_sentences(passages: list[list[str]], place: int) -> list[str]:
    """Sentences of the passage at `place` that no other sentence of `passages` starts like."""
    counts = Counter(_opening(sentence) for passage in passages for sentence in passage)
    return [sentence for sentence in passages[place] if _is_askable(sentence) and counts[_opening(sentence)] == 1]
