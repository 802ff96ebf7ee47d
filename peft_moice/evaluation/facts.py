"""Finding one of a list of facts, "Lost in the Middle" (Liu et al., TACL 2024), and chats about such lists."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..training.data.facts import FactList, Split, chat_about, fact_about, question_about, sample_facts
from ..training.data.sequences import check_fast, encode_marked, render_chat
from .task import Example, Scoring, place


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
            opening = fact_about(name, "").rstrip(".")
            examples.append(Example(f"{facts}\n\n{question_about(name)}", (code,), position, length, opening))
        return examples


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
    text = render_chat(tokenizer, chat_about(str(facts), facts, asked))
    spans, end = [], 0
    for index in asked:
        question = question_about(facts.names[index])
        start = text.index(facts.codes[index], text.index(question, end) + len(question))
        end = start + len(facts.codes[index])
        spans.append((start, end))
    return EncodedChat(*encode_marked(tokenizer, text, spans))
