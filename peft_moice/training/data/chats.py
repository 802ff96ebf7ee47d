"""Chats from records of the formats that data sets have."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .sources import Source, read_records

Chat = list[dict[str, str]]
"""Messages, each with a "role" and a "content"."""

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
"""Roles of ShareGPT's files, and what chat templates call them."""
_ANSWERS = ("answer", "completion", "response")
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction",), ("output",)),
    "prompt_answer": (("prompt",), _ANSWERS),
    "question_answer": (("question",), ("context",), ("answers", *_ANSWERS)),
}
"""The columns of each format, and by what names they are known."""


class BadRecord(Exception):
    """What is wrong with a record."""


def read_chats(
    source: Source, data_format: str = "auto", columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Chat]]:
    """Chats of a source, and where they stand. The format "auto" is told by the columns of the first record; `columns`
    has the record's own name of a column, by the name that the format has.

    Raises:
        ValueError: a record is not in the format, naming source, line and reason.
    """
    for where, record in read_records(source):
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"a record has to be an object with named columns, not {record!r:.60}.")
            if columns:
                record = _renamed(record, columns)
            if data_format == "auto":
                data_format = format_of(record)
            messages = _checked(_READERS[data_format](record, *_values(record, data_format)))
        except BadRecord as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, messages


def format_of(record: Mapping[str, Any]) -> str:
    """The format that a record's columns belong to."""
    for data_format, columns in _NEEDED.items():
        if all(record.keys() & {*names} for names in columns):
            return data_format
    raise BadRecord(
        f"the columns {sorted(record)} are of no known format. Give messages; conversations; prompt and answer; "
        "question, context and answers; or instruction and output. --columns NAME=COLUMN takes other names."
    )


def _values(record: Mapping[str, Any], data_format: str) -> list[Any]:
    """The values of the columns that a format needs."""
    values = []
    for names in _NEEDED[data_format]:
        known = [record[name] for name in names if record.get(name) is not None]
        if not known:
            needed = " and ".join(first for first, *_ in _NEEDED[data_format])
            raise BadRecord(f"no {names[0]!r}; the format {data_format} needs {needed}.")
        values.append(known[0])
    return values


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if missing := [column for column in columns.values() if column not in record]:
        raise BadRecord(f"no column {missing[0]!r}, which --columns names; there are {', '.join(record)}.")
    others = {name: value for name, value in record.items() if name not in columns.values()}
    return {**others, **{name: record[column] for name, column in columns.items()}}


def _messages(record: Mapping[str, Any], messages: Any) -> Any:
    return messages


def _sharegpt(record: Mapping[str, Any], turns: Any) -> Any:
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRecord("'conversations' has to be a list of messages.")
    messages = _system(record)
    for turn in turns:
        if turn.get("from") is None:  # newer files name them as chat templates do
            messages.append(turn)
            continue
        if turn["from"] not in _ROLES:
            raise BadRecord(f"a message is from {turn['from']!r}; known are {', '.join(_ROLES)}.")
        messages.append({"role": _ROLES[turn["from"]], "content": turn.get("value")})
    return messages


def _prompt_answer(record: Mapping[str, Any], prompt: Any, answer: Any) -> Any:
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return prompt + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])


def _question_answer(record: Mapping[str, Any], question: Any, context: Any, answers: Any) -> Any:
    """As SQuAD and its kin have it: a passage or several, a question, and answers of which the first is learned."""
    passages = context if isinstance(context, list) else [context]
    if isinstance(answers, Mapping):  # SQuAD's texts beside where they start
        answers = answers.get("text")
    if isinstance(answers, list):
        answers = answers[0] if answers else ""
    if not all(isinstance(part, str) for part in [*passages, question, answers]):
        raise BadRecord(
            "'question' has to be a string, 'context' a string or a list of them, and the answers likewise, or an "
            "object with 'text'."
        )
    prompt = "\n\n".join([*passages, question])
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers}]


def _alpaca(record: Mapping[str, Any], instruction: Any, output: Any) -> Any:
    parts = [instruction, record.get("input")]
    if not all(isinstance(part, str) for part in parts if part is not None):
        raise BadRecord("'instruction' and 'input' have to be strings.")
    prompt = "\n\n".join(filter(None, parts))
    return [*_system(record), {"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def _system(record: Mapping[str, Any]) -> list[Any]:
    """The message of a column of this name, if there is one."""
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


_READERS: dict[str, Callable[..., Any]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_answer": _prompt_answer,
    "question_answer": _question_answer,
    "alpaca": _alpaca,
}
"""What makes messages of a record and the values of its columns in [`_NEEDED`]."""


def _checked(messages: Any) -> Chat:
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise BadRecord("every message needs a 'role' and a 'content', both strings.")
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            half = message["content"][error.start]
            raise BadRecord(f"a message holds {half!r}, half of a character, as text cut in the middle has.") from None
    if messages and messages[0]["role"] == "assistant":
        raise BadRecord("the first message is an answer, which needs a prompt before it.")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise BadRecord("there is no answer, which is a message of the role 'assistant' with content.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
