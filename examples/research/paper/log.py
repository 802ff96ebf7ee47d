"""The log: a line of JSON for each measurement, with all that one needs to repeat it."""

import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_moice
from peft_moice.evaluation import Result, Score


def write(file: Path, record: dict[str, Any]) -> None:
    """Append `record`, with versions, device and command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    about = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, peft_moice)},
        "python": platform.python_version(),
        "device": device,
        "command": " ".join(["python examples/research/paper", *map(_without_folder, sys.argv[1:])]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**record, **about}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All lines; none if there is no file. Of several of the same measurement the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return list({key(record): record for record in map(json.loads, lines)}.values())


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a measurement is of."""
    return tuple(
        str(record.get(name)) for name in ("table", "model", "method", "recipe", "task", "data", "seed", "small")
    )


def pack(result: Result) -> dict[str, Any]:
    """A result, its losses left out, ready for JSON."""
    scores = [[score.group, score.length, score.position, score.score] for score in result.scores]
    return {"task": result.task, "unit": result.unit, "model": result.model, "seed": result.seed, "scores": scores}


def unpack(values: dict[str, Any]) -> Result:
    """What [`pack`] was called on, but for its losses."""
    scores = tuple(Score(*row, loss=math.nan, tokens=math.nan) for row in values["scores"])
    return Result(**{**values, "scores": scores})


def _without_folder(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
