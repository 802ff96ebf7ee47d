"""From examples to token ids."""

from dataclasses import dataclass
from typing import Any

from ..training.data.sequences import encode_marked, render_chat
from .task import Example


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt with its answer.

    Attributes:
        input_ids: of both.
        start: index of the first token of the answer.
    """

    input_ids: list[int]
    start: int


def encode_example(tokenizer: Any, example: Example, answer: str) -> EncodedExample:
    """Encode a prompt, in the tokenizer's chat template if it has one, and an answer to it.

    Raises:
        ValueError: the tokenizer is a slow one, its chat template refuses the prompt, or the answer is empty.
    """
    messages = [{"role": "user", "content": example.prompt}]
    before = render_chat(tokenizer, messages, add_generation_prompt=True) + example.opening
    ids, is_answer = encode_marked(tokenizer, before + answer, [(len(before), len(before) + len(answer))])
    # Tokens of words may begin with the space before them. Some tokenizers put an end of the text behind it, which is
    # no part of the answer, and stands for no characters.
    tokens = [index for index, belongs in enumerate(is_answer) if belongs]
    if not tokens or not answer.strip():
        raise ValueError(f"The answer {answer!r} has no tokens. Give answers that are not empty.")
    return EncodedExample(ids[: tokens[-1] + 1], tokens[0])
