"""Reading data in its original format: JSON lines, plain or compressed by gzip."""

import gzip
import json
from pathlib import Path
from typing import Any


def read_json_lines(file: str | Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file `*.jsonl` or `*.jsonl.gz`.

    Args:
        file: the file.
        needed: fields that each object has to have.

    Raises:
        ValueError: a line is not an object with these fields, or the file is empty.
    """
    opened = gzip.open if str(file).endswith(".gz") else open
    records = []
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
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
