"""Whether the file of an adapter's weights can be read, before a model is changed for it."""

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check_readable(folder: Path) -> None:
    """Raise if `folder` holds weights that cannot be read. Of safetensors only the header is.

    Raises:
        SafetensorError: the file is damaged.
        UnpicklingError: a `.bin` file is damaged, or would run code.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, "pt"):
                return
        except SafetensorError as error:
            raise SafetensorError(f"{path} is damaged ({error}). Get it anew, from where it came from.") from error
    if (folder / WEIGHTS_NAME).is_file():
        torch.load(folder / WEIGHTS_NAME, map_location="meta", weights_only=True)
