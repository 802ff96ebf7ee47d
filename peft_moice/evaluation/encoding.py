"""From examples to token ids."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

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
    check_fast(tokenizer)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": example.prompt}]
        before = apply_template(tokenizer, messages, add_generation_prompt=True) + example.opening
    else:
        before = f"{example.prompt}\n{example.opening}"
    encoded = tokenizer(
        before + answer,
        add_special_tokens=not tokenizer.chat_template,
        return_offsets_mapping=True,
        verbose=False,
    )
    # Tokens of words may begin with the space before them. Some tokenizers put an end of the text behind it, which is
    # no part of the answer, and stands for no characters.
    tokens = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before)]
    if not tokens or not answer.strip():
        raise ValueError(f"The answer {answer!r} has no tokens. Give answers that are not empty.")
    return EncodedExample(encoded["input_ids"][: tokens[-1] + 1], tokens[0])


def apply_template(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """`messages` as the tokenizer's chat template writes them.

    Raises:
        ValueError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"The chat template of the tokenizer refuses the prompt: {error}. Set `chat_template` to another, or to "
            "None, in the tokenizer."
        ) from None
    return text


def check_fast(tokenizer: Any) -> None:
    """Raise unless the tokenizer maps tokens to characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} cannot map tokens to characters. Load a fast tokenizer.")
