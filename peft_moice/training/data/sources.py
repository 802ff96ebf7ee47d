"""Reading sources: plain text, JSON, JSON lines, CSV, parquet, and data sets by their ids."""

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_CSV = (".csv", ".csv.gz")
RECORDS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", *_CSV, ".parquet")
"""Endings of files that hold records."""
_TEXT = (".txt", ".md", ".rst", ".tex", ".text", ".html")

Record = tuple[str, Any]
"""Where a record stands, for messages, and the record."""


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes:
        name: as the user gave it.
        kind: "file" for files of JSON, CSV or text; "parquet" and "dataset" for what `datasets` reads.
    """

    name: str
    kind: Literal["file", "parquet", "dataset"]

    @property
    def is_text(self) -> bool:
        """Whether it is a file that its name says to be plain text."""
        return self.kind == "file" and self.name.lower().endswith(_TEXT)


def read_source(name: str) -> Source:
    """What `name` is: a file; a folder or Hub id of a data set, followed by `:SPLIT` unless that is "train".

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_file():
        return Source(name, "parquet" if name.lower().endswith(".parquet") else "file")
    folder, _, _ = name.partition(":")
    if Path(folder).is_dir() or (re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not Path(folder).suffix[1:].isalpha()):
        return Source(name, "dataset")
    raise ValueError(
        f"{name}: there is no such file. Give the path of a file, or OWNER/NAME[:SPLIT] for a data set of the Hub."
    )


def read_text(file: str | Path) -> str:
    """The text of a file, decompressed if its name ends with `.gz`, without a byte order mark.

    Raises:
        ValueError: it is missing, damaged or not UTF-8, naming file, line and reason.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{file} is a folder. Name the files of text in it, such as {path / '*.txt'}.")
    if not path.is_file():
        raise ValueError(f"{file}: there is no such file. Give the path of a file of text.")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} cannot be decompressed ({error}). Download or compress it again.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from None


def read_records(source: Source) -> Iterator[Record]:
    """The records of a source, with where they stand.

    Raises:
        ValueError: it holds none, or is not in its format.
        ImportError: a package is missing that reads it.
    """
    if source.kind != "file":
        records = _dataset_records(source)
    elif source.name.lower().endswith(_CSV):
        records = _csv_records(source.name)
    else:
        records = _json_records(source.name)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise ValueError(f"{source.name} is empty. Give data with at least one record, or leave it out.")


def _json_records(file: str) -> Iterator[Record]:
    """Of a JSON array, or of JSON lines. Unlike in tables, rows may differ in their fields; and errors name lines."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from None
        for number, record in enumerate(records, start=1):
            yield f"{file}, record {number}", record
        return
    # Not by `splitlines`: strings in JSON may hold the separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: not JSON ({error}). Give JSON lines or a JSON array; for plain text, say "
                "data_format text or documents."
            ) from None
        yield f"{file}, line {number}", record


def _csv_records(file: str) -> Iterator[Record]:
    """Of a table with a header. Every value stays a string: as numbers, codes would lose their zeros in front."""
    csv.field_size_limit(2**31 - 1)  # of characters; a prompt has more than the 131,072 that are usual
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(
                    f"{file}, line {rows.line_num}: another number of values than the header has columns. Separate "
                    "values by commas, and quote those that hold commas, quotes or line breaks."
                )
            yield f"{file}, line {rows.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num + 1}: not CSV ({error}).") from None


def _dataset_records(source: Source) -> Iterator[Record]:
    name = source.name
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError(f"{name} needs the package datasets: pip install 'peft_moice[train]'.") from error
    path, _, split = name.partition(":")
    split = split or "train"
    try:
        if source.kind == "parquet":
            rows = load_dataset("parquet", data_files=glob.escape(name), split="train")
        elif Path(path, "state.json").is_file():  # `Dataset.save_to_disk` writes one, and no splits
            rows = load_from_disk(path)
        else:
            rows = load_dataset(path, split=split)
    except Exception as error:
        # Whatever a data set's files, its configs and the network raise, each in classes of their own.
        what = "this file" if source.kind == "parquet" else f"the split {split!r} of this data set"
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: {what} cannot be read ({type(error).__name__}: {reason}).") from error
    assert isinstance(rows, Dataset)
    for number, record in enumerate(rows, start=1):
        yield f"{name}, row {number}", record
