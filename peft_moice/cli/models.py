"""Loads models, tokenizers and adapters by name, as cheaply as what is asked of them allows."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from .parsing import UsageError

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a model's weights; "auto" is the checkpoint's own."""


def base_name(model: str | None, adapter: str | None, peft_type: str | None = None) -> str:
    """Name of the base model: as given, or as the adapter's config has it.

    Args:
        model: as given.
        adapter: folder or Hub id.
        peft_type: what the adapter has to be. Default: anything.

    Raises:
        UsageError: neither says it, or the adapter is of another type.
        ValueError: there is no such adapter.
    """
    base = model
    if adapter is not None:
        check_folder(adapter, "--adapter", ADAPTER_CONFIG_NAME)
        try:
            config = PeftConfig.from_pretrained(adapter)
        except KeyError as error:
            raise ValueError(f"{adapter}: this PEFT does not know the adapter's type {error}. Upgrade it.") from None
        if peft_type is not None and config.peft_type != peft_type:
            raise UsageError(f"{adapter} is an adapter of the type {config.peft_type}, not {peft_type}.")
        base = base or config.base_model_name_or_path
    if not base:
        raise UsageError("no base model. Name it with --model, as a folder or Hub id.")
    check_folder(base, "--model" if model else "the base model of the adapter", CONFIG_NAME, ADAPTER_CONFIG_NAME)
    return base


def check_folder(name: str, what: str, *files: str) -> None:
    """Raise a UsageError where `name` is a path that leads to nothing, which else would be looked for on the Hub.

    Args:
        name: folder or Hub id.
        what: what it is of, for the message.
        files: of which a folder has to hold one.
    """
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in files):
            return
        inside = [child for child in sorted(folder.iterdir()) if any((child / file).is_file() for file in files)]
        raise UsageError(
            f"{what} {name}: the folder holds no {' and no '.join(files)}. "
            + (f"{inside[0]} does; name that." if inside else "Name the folder that `save_pretrained` wrote.")
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UsageError(f"{what} {name}: there is no such folder. Name one, or a Hub id, OWNER/NAME.")


def load_tokenizer(model: str, adapter: str | None = None) -> Any:
    """The tokenizer of a model, with the chat template that its adapter was trained with, if that was saved.

    Raises:
        UsageError: `model` is a folder without one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if not Path(model).is_dir():
            raise
        raise UsageError(
            f"{model}: no tokenizer can be read from this folder ({error}) Save the model's there, with "
            "`tokenizer.save_pretrained`."
        ) from error
    if adapter is not None:
        try:
            template = AutoTokenizer.from_pretrained(adapter).chat_template
        except (OSError, ValueError):  # an adapter alone
            template = None
        if template and template != tokenizer.chat_template:
            logger.info("Prompts are written in the chat template of %s, not in that of %s.", adapter, model)
            tokenizer.chat_template = template
    return tokenizer


def load_model(model: str, dtype: Dtype | None = None, adapter: str | None = None) -> Any:
    """A causal language model, with an adapter if one is named, on the accelerator if there is one.

    Args:
        model: folder or Hub id.
        dtype: of its weights. Default: float32 on a CPU, where others are slow, and the checkpoint's own on an
            accelerator.
        adapter: folder or Hub id of an adapter of PEFT.
    """
    has_accelerator = torch.accelerator.is_available()
    with nullcontext(model) if adapter is None else _base_alone(model) as base:
        loaded = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype or ("auto" if has_accelerator else "float32"),
            device_map="auto" if has_accelerator else None,
        )
    loaded.name_or_path = loaded.config._name_or_path = model
    return loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter)


@contextmanager
def _base_alone(model: str) -> Iterator[str]:
    """The model of a folder without an adapter beside it, which transformers would load as well.

    A folder that holds an adapter only is left to transformers, which finds its base model.
    """
    folder = Path(model)
    if not ((folder / ADAPTER_CONFIG_NAME).is_file() and (folder / CONFIG_NAME).is_file()):
        yield model
        return
    with TemporaryDirectory() as alone:
        for file in folder.resolve().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(alone) / file.name).symlink_to(file)
        yield alone
