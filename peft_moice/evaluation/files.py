"""Reading data in its original format: JSON lines, plain or compressed by gzip."""

import json
from pathlib import Path
from typing import Any

from ..training.data import read_text


def read_json_lines(file: str | Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file `*.jsonl` or `*.jsonl.gz`.

    Args:
        file: the file.
        needed: fields that each object has to have.

    Raises:
        ValueError: the file is missing or damaged, a line is not an object with these fields, or the file is empty.
    """
    records = []
    # Not by `splitlines`: strings in JSON may hold the separators of Unicode.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}). Give a file of JSON lines.") from None
        missing = [name for name in needed if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{file}, line {number}: no {missing[0]!r}; an object with {needed} is needed.")
        records.append(record)
    if not records:
        raise ValueError(f"{file} is empty. Give a file of JSON lines with {needed}.")
    return records
