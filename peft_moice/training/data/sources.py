"""Reading sources: plain text, JSON, JSON lines, parquet, and data sets by their ids."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RECORDS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".parquet")
"""Endings of files that hold records."""
_TEXT = (".txt", ".md", ".rst", ".tex", ".text", ".html")

Record = tuple[str, Any]
"""Where a record stands, for messages, and the record."""


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes:
        name: as the user gave it.
        kind: "file" for files of JSON or text, "parquet", or "dataset" for what `datasets.load_dataset` reads.
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
    readers = {"file": _json_records, "parquet": _parquet_records, "dataset": _dataset_records}
    empty = True
    for record in readers[source.kind](source.name):
        empty = False
        yield record
    if empty:
        raise ValueError(f"{source.name} is empty. Give data with at least one record, or leave it out.")


def _json_records(file: str) -> Iterator[Record]:
    """Of a JSON array, or of JSON lines."""
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


def _parquet_records(file: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{file}: parquet needs pyarrow: pip install 'peft_moice[train]'.") from error
    number = 0
    try:
        for batch in ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", record
    except ArrowException as error:
        raise ValueError(f"{file}: not a parquet file that can be read ({error}).") from None


def _dataset_records(name: str) -> Iterator[Record]:
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError(f"{name}: data sets need the package datasets: pip install 'peft_moice[train]'.") from error
    path, _, split = name.partition(":")
    split = split or "train"
    try:
        # `Dataset.save_to_disk` writes one, and no splits.
        saved = Path(path, "state.json").is_file()
        rows = load_from_disk(path) if saved else load_dataset(path, split=split)
    except Exception as error:
        # Whatever a data set's files, its configs and the network raise, each in classes of their own.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: the split {split!r} of this data set cannot be read ({type(error).__name__}: {reason})."
        ) from error
    assert isinstance(rows, Dataset)
    for number, record in enumerate(rows, start=1):
        yield f"{name}, row {number}", record
