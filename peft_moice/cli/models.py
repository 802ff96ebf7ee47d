"""Loads models, tokenizers and adapters by name, as cheaply as what is asked of them allows."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import CONFIG_NAME
from transformers.utils.import_utils import is_bitsandbytes_available

from .parsing import UsageError, option

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a model's weights; "auto" is the checkpoint's own."""


@dataclass(kw_only=True)
class ModelArguments:
    """Which base model, and how its weights are held."""

    model: str | None = option("Folder or Hub id. Default: the base of --adapter.", None)
    dtype: Dtype | None = option(
        "auto (its own), float32, bfloat16, float16. Default: float32 on a CPU, else auto.", None
    )
    load_in_4bit: bool = option("Quantise the base to nf4, with bitsandbytes.", False)
    load_in_8bit: bool = option("Quantise the base to int8, with bitsandbytes.", False)

    def quantization(self) -> BitsAndBytesConfig | None:
        """What transformers quantises the base model by; None if it does not."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError("--load_in_4bit and --load_in_8bit exclude each other. Drop one.")
        if not is_bitsandbytes_available():
            raise UsageError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")
        own = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=own if self.dtype in (None, "auto") else self.dtype,
        )


def base_name(model: str | None, adapter: str | None, peft_type: str | None = None) -> str:
    """Name of the base model: as given, or as the config of the adapter, which has to be of `peft_type`, has it."""
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
    """Raise a UsageError where `name` is a path that leads to none of `files`, which else would be looked for on the
    Hub. `what` it is of, the message says.
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
    """The tokenizer of a model, with the chat template that its adapter was trained with, if that was saved."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if not Path(model).is_dir():
            raise
        raise UsageError(
            f"{model}: no tokenizer can be read from this folder ({error}) Save one with `tokenizer.save_pretrained`."
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


def load_model(
    model: str,
    dtype: Dtype | None = None,
    adapter: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> Any:
    """A causal language model, with an adapter of PEFT if one is named, on the accelerator if there is one.

    The default of `dtype` is float32 on a CPU, where others are slow, and the checkpoint's own on an accelerator.
    """
    has_accelerator = torch.accelerator.is_available()
    with nullcontext(model) if adapter is None else _base_alone(model) as base:
        loaded = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype or ("auto" if has_accelerator else "float32"),
            device_map="auto" if has_accelerator else None,
            quantization_config=quantization,
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
