"""Reading data of benchmarks in their original format, JSON lines."""

from pathlib import Path
from typing import Any

from ..training.data.sources import Source, read_records


def read_json_lines(file: str | Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file `*.jsonl` or `*.jsonl.gz`.

    Args:
        file: the file.
        needed: fields that each object has to have.

    Raises:
        ValueError: the file is missing or damaged, a line is not an object with these fields, or the file is empty.
    """
    records = []
    for where, record in read_records(Source(str(file), "file")):
        missing = [name for name in needed if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r}; an object with {needed} is needed.")
        records.append(record)
    return records
