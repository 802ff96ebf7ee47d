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


class BadRecord(Exception):
    """What is wrong with a record."""


def read_chats(
    source: Source, data_format: str = "auto", columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Chat]]:
    """Chats of a source, and where they stand.

    Args:
        source: what to read.
        data_format: "messages", "sharegpt", "prompt_answer", "question_answer" or "alpaca". Default: "auto", by the
            columns of the first record.
        columns: the record's own name of a column, by the name that the format has. Default: the same names.

    Raises:
        ValueError: a record is not in the format, naming source, line and reason.
    """
    for where, record in read_records(source):
        try:
            if columns:
                record = _renamed(_as_mapping(record), columns)
            if data_format == "auto":
                data_format = format_of(record)
            messages = _READERS[data_format](_as_mapping(record))
            _check(messages)
        except BadRecord as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, messages


def format_of(record: object) -> str:
    """The format that a record's columns belong to."""
    columns = _as_mapping(record).keys()
    for data_format, needed in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
    ):
        if needed <= columns:
            return data_format
    if "prompt" in columns and columns & {*_ANSWERS}:
        return "prompt_answer"
    if {"question", "context"} <= columns and columns & {"answers", *_ANSWERS}:
        return "question_answer"
    raise BadRecord(
        f"the columns {sorted(columns)} are of no known format. Give messages; conversations; prompt and answer; "
        "question, context and answers; or instruction and output. --columns NAME=COLUMN takes other names."
    )


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if missing := [column for column in columns.values() if column not in record]:
        raise BadRecord(f"no column {missing[0]!r}, which --columns names; there are {', '.join(record)}.")
    others = {name: value for name, value in record.items() if name not in columns.values()}
    return {**others, **{name: record[column] for name, column in columns.items()}}


def _messages(record: Mapping[str, Any]) -> Chat:
    _need(record, "messages", format_="messages")
    return _list_of_messages(record["messages"])


def _sharegpt(record: Mapping[str, Any]) -> Chat:
    _need(record, "conversations", format_="sharegpt")
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRecord("'conversations' has to be a list of messages.")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for turn in turns:
        if turn.get("from") is None:  # newer files name them as chat templates do
            messages += _list_of_messages([turn])
            continue
        if turn["from"] not in _ROLES:
            raise BadRecord(f"a message is from {turn['from']!r}; known are {', '.join(_ROLES)}.")
        messages.append({"role": _ROLES[turn["from"]], "content": turn.get("value")})
    return _list_of_messages(messages)


def _prompt_answer(record: Mapping[str, Any]) -> Chat:
    answers = [name for name in _ANSWERS if record.get(name) is not None]
    _need(record, "prompt", answers[0] if answers else "answer", format_="prompt_answer")
    prompt, answer = record["prompt"], record[answers[0]]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
    return [*_list_of_messages(prompt), *_list_of_messages(answer)]


def _question_answer(record: Mapping[str, Any]) -> Chat:
    """As SQuAD and its kin have it: a passage or several, a question, and answers of which the first is learned."""
    name = next((name for name in ("answers", *_ANSWERS) if record.get(name) is not None), "answers")
    _need(record, "question", "context", name, format_="question_answer")
    context, answers = record["context"], record[name]
    passages = context if isinstance(context, list) else [context]
    if isinstance(answers, Mapping):  # SQuAD's texts beside where they start
        answers = answers.get("text")
    if isinstance(answers, list):
        answers = answers[0] if answers else ""
    if not all(isinstance(part, str) for part in [*passages, record["question"], answers]):
        raise BadRecord(
            f"'question' has to be a string, 'context' a string or a list of them, and {name!r} likewise, or an "
            "object with 'text'."
        )
    prompt = "\n\n".join([*passages, record["question"]])
    return _list_of_messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": answers}])


def _alpaca(record: Mapping[str, Any]) -> Chat:
    _need(record, "instruction", "output", format_="alpaca")
    parts = [record["instruction"], record.get("input")]
    if not all(isinstance(part, str) for part in parts if part is not None):
        raise BadRecord("'instruction' and 'input' have to be strings.")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages += [
        {"role": "user", "content": "\n\n".join(filter(None, parts))},
        {"role": "assistant", "content": record["output"]},
    ]
    return _list_of_messages(messages)


_READERS: dict[str, Callable[[Mapping[str, Any]], Chat]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_answer": _prompt_answer,
    "question_answer": _question_answer,
    "alpaca": _alpaca,
}


def _as_mapping(record: object) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record has to be an object with named columns, not {record!r:.60}.")
    return record


def _need(record: Mapping[str, Any], *names: str, format_: str) -> None:
    for name in names:
        if record.get(name) is None:
            raise BadRecord(f"no {name!r}; the format {format_} needs {' and '.join(names)}.")


def _list_of_messages(messages: object) -> Chat:
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
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check(messages: Chat) -> None:
    if messages and messages[0]["role"] == "assistant":
        raise BadRecord("the first message is an answer, which needs a prompt before it.")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise BadRecord("there is no answer, which is a message of the role 'assistant' with content.")
