"""Examples for training: everything that the files hold, encoded, checked for length, and packed if wanted."""

import logging
from collections.abc import Sequence
from typing import Any, get_args

from tqdm.auto import tqdm

from .arguments import DataArguments, DataFormat
from .chats import Chat, read_chats
from .documents import document_chats
from .sequences import encode_chat, encode_text
from .sources import RECORDS, read_source, read_text

logger = logging.getLogger(__name__)

Example = list[dict[str, list[int]]]
"""What one row of a batch is made of: `input_ids` and `labels` of one sequence, or of several packed ones."""


def load_examples(
    files: Sequence[str], tokenizer: Any, args: DataArguments | None = None, seed: int = 0, quiet: bool = False
) -> list[Example]:
    """Read and encode `files`; an empty list gives an empty list.

    Args:
        files: files of text, JSON, JSON lines, CSV or parquet, or data sets `OWNER/NAME[:SPLIT]`.
        tokenizer: a fast tokenizer.
        args: format and lengths; its own files are not looked at. Default: what [`DataArguments`] has.
        seed: of the questions that are made about documents. Default: 0.
        quiet: without a progress bar. Default: False.

    Returns:
        One example for each sequence, or for each row of packed ones.

    Raises:
        ValueError: a file is not in its format (naming file, line and reason), nothing is left to train on, or a value
            is out of its range.
        ImportError: a package is missing that reads a source.
    """
    if not files:
        return []
    args = DataArguments(list(files)) if args is None else args
    if args.max_length < 2:
        raise ValueError(f"max_length is {args.max_length}, but has to be at least 2.")
    data_format = _format(files, args.data_format)
    if data_format == "text":
        sequences = [sequence for file in files for sequence in encode_text(file, tokenizer, args.max_length)]
    else:
        chats = _chats(files, args, data_format, seed)
        with tqdm(chats, desc="encoding", unit="chat", disable=quiet) as progress:
            sequences = [encode_chat(where, messages, tokenizer, args.loss_on) for where, messages in progress]
    kept = [sequence for sequence in sequences if len(sequence["input_ids"]) <= args.max_length]
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    if not kept:
        raise ValueError(
            f"{', '.join(files)}: every sequence exceeds max_length {args.max_length}. The longest has {longest} "
            "tokens; raise max_length to as many."
        )
    dropped = len(sequences) - len(kept)
    if dropped and data_format == "documents":
        raise ValueError(
            f"{', '.join(files)}: {dropped} of {len(sequences)} prompts exceed max_length {args.max_length}, and "
            "without them not every place would be asked for equally often. Raise max_length to "
            f"{longest}, or lower documents_per_prompt or passage_words."
        )
    if dropped:
        logger.warning(
            "%d of %d chats exceed max_length %d and are left out; max_length %d takes all.",
            *(dropped, len(sequences), args.max_length, longest),
        )
    return pack(kept, args.max_length) if args.packing else [[sequence] for sequence in kept]


def plain_text(files: Sequence[str], data_format: str = "auto", columns: Sequence[str] = ()) -> str:
    """The ordinary text in `files`: their text, or what stands in their chats beside the assistant's answers.

    Args:
        files: as for [`load_examples`].
        data_format: as [`DataArguments`] has it. Default: "auto".
        columns: likewise. Default: none.

    Raises:
        ValueError: see [`load_examples`].
    """
    if _format(files, data_format) in ("text", "documents"):
        return "\n\n".join(read_text(file) for file in files)
    chats = _chats(files, DataArguments(list(files), columns=list(columns)), data_format, seed=0)
    return "\n\n".join(
        message["content"] for _, messages in chats for message in messages if message["role"] != "assistant"
    )


def pack(sequences: list[dict[str, list[int]]], max_length: int) -> list[Example]:
    """Neighbors among `sequences` together, as long as they fit into `max_length` tokens; longer ones stand alone."""
    packed: list[Example] = []
    free = 0
    for sequence in sequences:
        length = len(sequence["input_ids"])
        if length > free:
            packed.append([])
            free = max_length
        packed[-1].append(sequence)
        free -= length
    return packed


def _format(files: Sequence[str], data_format: str) -> str:
    """`data_format`, with "auto" made "text" for files of text."""
    if data_format not in get_args(DataFormat):
        raise ValueError(f"data_format is {data_format!r}; choose one of {', '.join(get_args(DataFormat))}.")
    if data_format in ("text", "documents"):
        for file in files:
            if str(file).lower().endswith(RECORDS):
                raise ValueError(
                    f"{file} holds records, and the format {data_format} reads plain text. Leave data_format out (and "
                    "the preset retrieval, in favour of chats), or give text."
                )
        return data_format
    sources = [read_source(file) for file in files]
    text = [source.name for source in sources if source.is_text]
    if text and data_format != "auto":
        raise ValueError(f"{text[0]} is plain text, which the format {data_format} does not read.")
    if text and len(text) < len(sources):
        raise ValueError(f"{text[0]} is plain text, but other files are not. Train on one of both.")
    return "text" if text else data_format


def _chats(files: Sequence[str], args: DataArguments, data_format: str, seed: int) -> list[tuple[str, Chat]]:
    if data_format == "documents":
        return list(document_chats(files, args, seed))
    pairs = [pair.partition("=") for pair in args.columns]
    if wrong := [name + sign + column for name, sign, column in pairs if not (name and column)]:
        raise ValueError(f"columns holds {wrong[0]!r}, but is made of NAME=COLUMN, such as question=query.")
    columns = {name: column for name, _, column in pairs}
    return [chat for file in files for chat in read_chats(read_source(file), data_format, columns)]
