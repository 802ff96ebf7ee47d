"""What the file of an adapter's weights holds, before a model is changed for it."""

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def names_of_weights(folder: Path) -> set[str] | None:
    """Names of the weights in `folder`, of which only names are read; None if there are no weights.

    Raises:
        SafetensorError: the file is damaged.
        UnpicklingError: a `.bin` file is damaged, or would run code.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                return set(file.keys())
        except SafetensorError as error:
            raise SafetensorError(f"{path} is damaged ({error}). Get it anew, from where it came from.") from error
    if (folder / WEIGHTS_NAME).is_file():
        return set(torch.load(folder / WEIGHTS_NAME, map_location="meta", weights_only=True))
    return None
