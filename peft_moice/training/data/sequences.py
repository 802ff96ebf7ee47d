"""Chats and text as token ids and labels."""

from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError

from .chats import Chat
from .sources import read_text

Sequence = dict[str, list[int]]
"""`input_ids` and `labels` of one sequence; labels are -100 where nothing is learned."""


def encode_chat(where: str, messages: Chat, tokenizer: Any, loss_on: str = "answers") -> Sequence:
    """Token ids and labels of a chat.

    Args:
        where: where it stands, for messages.
        messages: the chat.
        tokenizer: a fast tokenizer. Without a chat template, messages are joined by newlines.
        loss_on: "answers" (default) learns what the assistant says, with the end of its turn; "all" the whole chat.

    Raises:
        ValueError: the template refuses the chat, or writes it such that answers cannot be told from prompts; or the
            tokenizer is a slow one, which cannot tell them; another `loss_on`.
    """
    if loss_on not in ("answers", "all"):
        raise ValueError(f"loss_on is {loss_on!r}; choose 'answers' or 'all'.")

    def render(count: int, add_generation_prompt: bool = False) -> str:
        text = render_chat(tokenizer, messages[:count], add_generation_prompt, where)
        is_whole = count == len(messages) and not tokenizer.chat_template
        return text + (tokenizer.eos_token or "") if is_whole else text

    text = render(len(messages))
    if loss_on == "all":
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"]
        return {"input_ids": list(ids), "labels": list(ids)}
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(index, add_generation_prompt=True), render(index + 1)
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"{where}: the chat template writes message {index} differently when others follow, so "
                    "answers cannot be told from prompts. Use loss_on all, chats of one answer (for documents: "
                    "questions 1), or another chat_template."
                )
            spans.append((len(before), len(after)))
    ids, is_marked = encode_marked(tokenizer, text, spans)
    return {
        "input_ids": ids,
        "labels": [token if marked else -100 for token, marked in zip(ids, is_marked, strict=True)],
    }


def render_chat(tokenizer: Any, messages: Chat, add_generation_prompt: bool = False, where: str = "") -> str:
    """A chat as the tokenizer's template writes it, with what an answer begins behind if `add_generation_prompt`.
    Without a template, its messages joined by newlines.

    Raises:
        ValueError: the template refuses the chat; it begins with `where`, the place of the chat.
    """
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in messages) + "\n" * add_generation_prompt
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"{f'{where}: ' if where else ''}the chat template of the tokenizer refuses this chat: {error}. Set "
            "`chat_template` to another, or to None, in the tokenizer."
        ) from None
    return text


def encode_marked(tokenizer: Any, text: str, spans: Iterable[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Token ids of what [`render_chat`] wrote, and for each of them whether it has characters in one of `spans`.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    check_fast(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True, verbose=False
    )
    spans = list(spans)
    is_marked = [
        any(start < token_end and token_start < end for start, end in spans)
        for token_start, token_end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), is_marked


def check_fast(tokenizer: Any) -> None:
    """Raise a ValueError unless the tokenizer maps tokens to characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} cannot map tokens to characters, which tells answers from prompts. Load a "
            "fast tokenizer, or learn whole chats with loss_on all."
        )


def encode_text(file: str, tokenizer: Any, max_length: int) -> list[Sequence]:
    """Consecutive sequences of a file of text, the last one as short as it comes out.

    Args:
        file: the file.
        tokenizer: the model's.
        max_length: tokens of a sequence, at least 2.

    Raises:
        ValueError: the file cannot be read, or holds fewer than two tokens.
    """
    tokens = tokenizer(read_text(file), verbose=False)["input_ids"]
    chunks = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    if not chunks:
        raise ValueError(f"{file}, line 1: there is no text. Give a file of text, or leave it out.")
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]
