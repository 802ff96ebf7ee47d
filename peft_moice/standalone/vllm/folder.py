"""Whether a folder can be served, seen from its files before a model is built."""

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...files.weights import read_header, read_json
from ...routing.spec import PEFT_TYPE_NAME
from ..built_in import ROUTERS_NAME
from ..description import read_description


def refuse_adapter(folder: Path) -> None:
    """Raise a ValueError if `folder` holds a MoICE adapter that is not merged, with the command that merges it."""
    file = folder / ADAPTER_CONFIG_NAME
    if not file.is_file() or read_json(file).get("peft_type") != PEFT_TYPE_NAME:
        return
    has_model = (folder / CONFIG_NAME).is_file()
    command = f"peft-moice merge {folder} {folder}-merged" + (f" --model {folder}" if has_model else "")
    raise ValueError(
        f"{folder} holds a MoICE adapter{' beside a model' if has_model else ''}, and servers run merged models. "
        f"Merge it with\n    {command}\nand serve {folder}-merged."
    )


def check_merged(folder: Path, description: dict[str, Any]) -> None:
    """Raise a ValueError, or a TypeError, if the weights or the description of a merged model are damaged or do not
    belong together.

    Reads the headers of the weights' files only. Folders without safetensors files are left to the server.

    Args:
        folder: the model's folder.
        description: `moice` of its config.
    """
    names = [name for file in _weight_files(folder) for name in read_header(file)]
    if not names:
        return
    read = read_description(description)
    expected = {
        f"{name}.{ROUTERS_NAME}.{index}" for name, layer in read.layers.items() for index, _ in enumerate(layer.specs)
    }
    if not expected and not read.ropes:
        raise ValueError(
            f"{folder / CONFIG_NAME} describes no layer with routers in `moice`. Merge the adapter again."
        )
    lacking = sorted(router for router in expected if not any(f".{router}." in f".{name}" for name in names))
    if lacking:
        raise ValueError(
            f"The weights in {folder} lack {len(lacking)} of {len(expected)} routers that the config describes, the "
            f"first of them {lacking[0]!r}. The folder is damaged: merge the adapter again."
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model; those that the index names where there is one."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [file for file in (folder / SAFE_WEIGHTS_NAME,) if file.is_file()]
    files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names. The folder was copied in part: copy "
            "it again."
        )
    return files
