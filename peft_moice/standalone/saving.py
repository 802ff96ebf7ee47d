"""How a model with routers is written as a folder that others can load, with a card, a stub and a tokenizer."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..files.atomic import staged, write_text
from ..hub.card import CARD_NAME
from .installing import check_loaded

logger = logging.getLogger(__name__)

_STUB = Path(__file__).with_name("configuration_moice.py")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


class WholeFolder:
    """How a standalone model is written and read: all of it, or not at all. Stands before a class of transformers."""

    name_or_path: str

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write the model, its tokenizer if it is at hand, a stub and a card, see `PreTrainedModel`.

        Until all is written, a model that was in the folder stays there as it was.

        Raises:
            OSError: the files cannot be written.
        """
        model: Any = super()
        folder = Path(save_directory)
        # All processes write parts of a distributed checkpoint into the same folder.
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            model.save_pretrained(folder, is_main_process, *args, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with _staged_model(folder, kwargs.get("variant")) as staging:
            model.save_pretrained(staging, is_main_process, *args, **kwargs)
            if not _has_tokenizer(folder):
                _put_tokenizer(staging, self.name_or_path)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Read a model, see `PreTrainedModel`.

        Raises:
            ValueError: the files lack weights of the routers or of layers, or hold routers that are not finite.
        """
        model_class: Any = super()
        model, info = model_class.from_pretrained(*args, output_loading_info=True, **kwargs)
        check_loaded(model, info)
        return (model, info) if output_loading_info else model


def write_stub(folder: Path) -> dict[str, str]:
    """Write the file that transformers runs, if it is trusted, to read a config without `import peft_moice`.

    Returns what `auto_map` in that config says of it.
    """
    write_text(folder / _STUB.name, _STUB.read_text(encoding="utf-8"))
    return {"AutoConfig": f"{_STUB.stem}.MoICEAutoConfig"}


def _put_tokenizer(folder: Path, source: str | None) -> None:
    """Write the tokenizer of the model at `source` to `folder`, if it is on this machine."""
    if not source or not (_has_tokenizer(Path(source)) or _cached_tokenizer(source)):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the model's own files are what matters, and tokenizers fail in many ways
        logger.warning("The tokenizer of %s is not written to %s: %s", source, folder, error)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def _cached_tokenizer(repo_id: str) -> bool:
    if os.path.isdir(repo_id):
        return False
    try:
        return any(isinstance(try_to_load_from_cache(repo_id, file), str) for file in _TOKENIZER_FILES)
    except HFValidationError:
        return False


@contextmanager
def _staged_model(folder: Path, variant: str | None) -> Iterator[Path]:
    """As [`staged`], for a model's files: a card goes on from the one in `folder`, and weights that were there before
    do not stay beside the new ones."""
    stem, suffix = SAFE_WEIGHTS_NAME.rsplit(".", 1)
    middle = f".{variant}" if variant else ""
    shard = rf"{re.escape(stem + middle)}(-\d{{5}}-of-\d{{5}})?\.{suffix}"
    index = re.escape(f"{SAFE_WEIGHTS_NAME}.index{middle}.json")
    with staged(folder, obsolete=f"{shard}|{index}") as staging:
        if (folder / CARD_NAME).exists():
            shutil.copy(folder / CARD_NAME, staging)
        yield staging
