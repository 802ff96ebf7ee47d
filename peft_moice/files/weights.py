"""What lies in files of weights and configs, seen before a model is built or changed for it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


class StoredTensor(NamedTuple):
    """A tensor of a file, without its values: `dtype` as safetensors calls it, such as "F32"."""

    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Reads nothing but its header.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
            return {name: StoredTensor(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or was copied in part ({error}). Get it anew, from where it came from."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, or holds no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not JSON ({error}). Get it anew, from where it came from.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object. Get it anew, from where it came from.")
    return content


def names_of_weights(folder: Path) -> set[str] | None:
    """Names of the weights in `folder`, of which only names are read; None if there are no weights.

    Raises:
        SafetensorError: the file is damaged.
        UnpicklingError: a `.bin` file is damaged, or would run code.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        try:
            return set(read_header(path))
        except ValueError as error:
            raise SafetensorError(str(error)) from error
    if (folder / WEIGHTS_NAME).is_file():
        return set(torch.load(folder / WEIGHTS_NAME, map_location="meta", weights_only=True))
    return None
