"""Whether a folder can be served, seen from its files before a model is built."""

from pathlib import Path

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...files.weights import read_header, read_json
from ...routing.spec import PEFT_TYPE_NAME


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


def check_files(folder: Path) -> None:
    """Raise a ValueError if weights of the model in `folder` are damaged or missing.

    Reads the headers of safetensors files only. What is in them is compared with the config when the model is loaded.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names. The folder was copied in part: "
                "copy it again."
            )
    for name in names:
        if (folder / name).is_file():
            read_header(folder / name)
