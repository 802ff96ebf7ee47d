"""What an adapter trains beside its routers, as PEFT does it: `modules_to_save` and `trainable_token_indices`."""

import logging
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, _get_input_embeddings_name
from torch import nn

logger = logging.getLogger(__name__)

_PEFT_PREFIX = "base_model.model."
_NAMES_OF_HEADS = {"classifier", "score", "qa_outputs"}
"""Modules that PEFT adds to `modules_to_save` for a `task_type`, whether the model has them or not."""


@dataclass
class StoredBeside:
    """What a config and the weights beside it said when they were read.

    Attributes:
        names: of the stored weights; None if they are not at hand.
        fields: `modules_to_save` and `trainable_token_indices`, as text.
    """

    names: set[str] | None
    fields: str


def fields_beside(config: Any) -> str:
    """`modules_to_save` and `trainable_token_indices` of `config`, as text to be compared."""
    return repr((config.modules_to_save, config.trainable_token_indices))


def check_token_indices(value: object) -> None:
    """Raise a TypeError unless `value` is a list of token indices, a dict from module names to such, or None."""
    lists = value.values() if isinstance(value, dict) else [value]
    is_dict_of_names = not isinstance(value, dict) or all(isinstance(name, str) for name in value)
    is_int = all(type(index) is int for indices in lists if isinstance(indices, (list, tuple)) for index in indices)
    if value is not None and not (is_dict_of_names and is_int and all(isinstance(i, (list, tuple)) for i in lists)):
        raise TypeError(
            "`trainable_token_indices` has to be a list of integers, or a dict from names of modules to such lists, "
            f"not {shortened(value)}."
        )


def check_beside_routers(config: Any, model: nn.Module, adapted: list[str]) -> None:
    """Raise if `config` asks PEFT to train modules that hold `adapted` ones, or tokens that `model` does not have."""
    tokens = {} if config.trainable_token_indices is None else config.trainable_token_indices
    if not isinstance(tokens, dict):
        tokens = {_get_input_embeddings_name(model, "embed_tokens"): tokens}
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in config.modules_to_save or ():
        matched = [name for name in modules if name.endswith(entry)]
        around = [name for name in adapted for part in matched if f"{name}.".startswith(f"{part}.")]
        if around:
            raise ValueError(
                f"`modules_to_save` holds {shortened(entry)}, which means the adapted attention module {around[0]!r} "
                "too, because PEFT takes every module whose name ends so, with all that is in it. Write more of the "
                "name, or leave the attention module out with `exclude_modules`."
            )
        both = [name for name in matched if any(name.endswith(key) for key in tokens)]
        if both:
            raise ValueError(
                f"{both[0]!r} is meant by `modules_to_save`, which trains all of it, and by "
                "`trainable_token_indices`, which trains some of its rows. Leave it out of one of them."
            )
        if not matched and entry not in _NAMES_OF_HEADS:
            logger.warning("`modules_to_save` holds %s, but no module's name ends so.", shortened(entry))
    for key, indices in tokens.items():
        for name, module in modules.items():
            if name.endswith(key):
                _check_rows(name, module, indices)


def check_stored_beside(model: nn.Module, adapter_name: str, names: set[str]) -> None:
    """Raise if weights that PEFT will load into the modules of `adapter_name` in `model` beside its routers are not
    among the stored `names`."""
    stored = {name.removeprefix(_PEFT_PREFIX) for name in names}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            field = "trainable_token_indices" if isinstance(module, TrainableTokensWrapper) else "modules_to_save"
            for weight in module.adapter_state_dict_load_map(adapter_name):
                if f"{name}.{weight}" not in stored:
                    raise ValueError(
                        f"The stored adapter lacks the weight {f'{name}.{weight}'!r}, which its config trains "
                        f"(`{field}`). Load it with the adapter_config.json it was saved with."
                    )


def _check_rows(name: str, module: nn.Module, indices: list[int]) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    num_rows: int | None = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
    if num_rows is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise ValueError(
            f"`trainable_token_indices` means {name!r} ({type(module).__name__}), which has no embeddings of tokens. "
            "Name the model's embedding, or give a list of indices, which are those of its input embeddings."
        )
    unknown = [index for index in indices if not 0 <= index < num_rows]
    if unknown or not indices:
        reason = f"holds {shortened(unknown[0])}" if unknown else "names no token"
        raise ValueError(
            f"`trainable_token_indices` {reason}, but {name!r} has the tokens 0 to {num_rows - 1}. Correct it, or "
            "make room for new tokens with `resize_token_embeddings`."
        )
