"""Whole models with routers built in: their classes and configs, and how they are written and read.

A standalone model is an instance of a subclass of its own class, made on demand: `LlamaForCausalLM` becomes
`MoICELlamaForCausalLM`, its config `MoICELlamaConfig` with the model type "moice" and the family's own in
`base_model_type`. Without `import peft_moice`, transformers refuses the model type; it cannot mistake the model for
the base model.
"""

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..attention import exchange_config, own_config
from ..files.atomic import write_text
from ..hub.card import merged_part, put_card, shared_name
from ..rope.rules import longest
from ..routing.mixture import watch_positions
from ..training import register_hooks, remove_hooks
from .built_in import ROUTERS_NAME, BuiltInRouters
from .description import describe_routers, read_description
from .installing import install_described
from .saving import WholeFolder, write_stub
from .sealing import sealed, unsealed

MODEL_TYPE = "moice"
_PREFIX = "MoICE"
"""What stands before a class's name in that of its standalone models."""


def make_standalone(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a transformers model whose attention modules have routers built in into a standalone model, in place.

    Its class changes. Its config is exchanged for a copy, because other models may have been made from it.
    """
    # Both may be standalone already, where something was merged into a model a second time.
    original: type[PreTrainedModel] = getattr(type(model), "original_class", type(model))
    original_config: type[PreTrainedConfig] = getattr(type(model.config), "original_class", type(model.config))
    config = copy.copy(model.config)
    config.__class__ = standalone_config_class(original_config)
    config.base_model_type = original_config.model_type
    config.moice = describe_routers(model)
    _state_new_length(config)
    if original is type(model):
        config.base_model_name_or_path = shared_name(model.config.name_or_path)
    _exchange_config(model, model.config, config)
    model.__class__ = standalone_model_class(original)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), ROUTERS_NAME}
    return model


def _state_new_length(config: Any) -> None:
    """Let a config say how long texts may be under its ropes by position."""
    experts, text = read_description(config.moice).ropes, config.get_text_config(decoder=True)
    end = longest(experts) if experts else None
    if end is not None and end > text.max_position_embeddings:
        text.max_position_embeddings = end


def _exchange_config(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for module in model.modules():
        if isinstance(module, BuiltInRouters):
            if module.rope.config is old:
                module.rope.config = new
        elif hasattr(module, "config") and own_config(module) is old:
            exchange_config(module, new)


P = ParamSpec("P")
R = TypeVar("R")


def _made_once(make: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache`, whose types refuse a class as an argument where its instances are not hashable."""
    cached: Any = functools.cache(make)
    made_once: Callable[P, R] = cached
    return made_once


@_made_once
def standalone_config_class(original: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of standalone models whose base has configs of class `original`."""

    class StandaloneConfig(original):  # type: ignore[misc, valid-type]  # a base known at run time only
        model_type = MODEL_TYPE
        base_model_type: str = original.model_type
        base_model_name_or_path: str | None = None
        moice: dict[str, Any] | None = None

        original_class = original

        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
            """Write the config, the stub that its `auto_map` names, and a model card, see `PreTrainedConfig`."""
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            # Not what a config from elsewhere may name.
            self.auto_map = write_stub(folder)
            self.put_in_card(folder)
            super().save_pretrained(str(folder), *args, **kwargs)

        def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
            """Write the config so that no class without routers reads it, see `PreTrainedConfig`."""
            fields = sealed(json.loads(self.to_json_string(use_diff)))
            write_text(Path(json_file_path), json.dumps(fields, indent=2, sort_keys=True) + "\n")

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Make a config from fields as they are in a file, see `PreTrainedConfig`."""
            return super().from_dict(unsealed(config_dict), **kwargs)

        def put_in_card(self, folder: str | os.PathLike[str]) -> None:
            """Say in the model card of `folder` what the model is."""
            found, name = read_description(self.moice), shared_name(self.base_model_name_or_path)
            auto_class = _auto_class_of(self)
            part = merged_part(found.routers, ropes=found.ropes, base_model=name, auto_class=auto_class)
            put_card(Path(folder), part)

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_instance, (standalone_config_class, original), self.__dict__

    StandaloneConfig.__name__ = StandaloneConfig.__qualname__ = f"{_PREFIX}{original.__name__}"
    for auto_class in _AUTO_CLASSES:
        if original in auto_class._model_mapping:
            found = auto_class._model_mapping[original]
            for model_class in found if isinstance(found, tuple) else (found,):
                auto_class.register(StandaloneConfig, _model_class(model_class, StandaloneConfig), exist_ok=True)
    return StandaloneConfig


def standalone_model_class(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of standalone models whose base is of class `original`."""
    return _model_class(original, standalone_config_class(_config_class_of(original)))


def __getattr__(name: str) -> type[PreTrainedModel] | type[PreTrainedConfig]:
    # The classes made above by the names that adapters, pickles and servers know them by.
    original = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(original, type) and issubclass(original, PreTrainedModel):
        return standalone_model_class(original)
    if isinstance(original, type) and issubclass(original, PreTrainedConfig):
        return standalone_config_class(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    assert model_class.config_class is not None  # only abstract classes have none
    return model_class.config_class


@_made_once
def _model_class(original: type[PreTrainedModel], standalone_config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    class StandaloneModel(WholeFolder, original):  # type: ignore[misc, valid-type]  # a base known at run time only
        original_class = original
        config_class = standalone_config
        _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
            *(original._keep_in_fp32_modules_strict or ()),
            ROUTERS_NAME,
        }

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            install_described(self, config.moice)
            # Auto classes may have built a decoder that is a standalone model, too.
            for module in self.modules():
                remove_hooks(module)
            register_hooks(self)
            watch_positions(self)

        @classmethod
        def is_custom_code(cls) -> bool:
            # transformers leaves out the initialization of some buffers in models that are not its own.
            return original.is_custom_code()

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_instance, (standalone_model_class, original), self.__dict__

    StandaloneModel.__name__ = StandaloneModel.__qualname__ = f"{_PREFIX}{original.__name__}"
    # Families whose checkpoints differ from their modules (fused experts, ...) stay in their checkpoint format.
    for identifier in (original.__name__, _config_class_of(original).model_type):
        conversions = get_checkpoint_conversion_mapping(identifier)
        if conversions is not None:
            register_checkpoint_conversion_mapping(StandaloneModel.__name__, conversions, overwrite=True)
            break
    return StandaloneModel


class MoICEAutoConfig(PreTrainedConfig):
    """What transformers' `AutoConfig` finds under "moice"; reading a config gives one of the family's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(  # type: ignore[override]  # transformers promises `cls`, and `AutoConfig` does not ask for it
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> PreTrainedConfig:
        base_model_type = config_dict.get("base_model_type")
        if base_model_type is None or base_model_type not in CONFIG_MAPPING or not config_dict.get("moice"):
            raise ValueError(
                f"This is not the config of a model with MoICE routers built in: 'base_model_type' is "
                f"{base_model_type!r} and 'moice' is {'set' if config_dict.get('moice') else 'missing'}. Write it "
                "with `merge_and_unload().save_pretrained(...)`; load an adapter with `PeftModel.from_pretrained`."
            )
        return standalone_config_class(CONFIG_MAPPING[base_model_type]).from_dict(config_dict, **kwargs)


def _auto_class_of(config: PreTrainedConfig) -> str:
    """Name of the auto class that makes the model that `config` was saved with."""
    saved_as = (config.architectures or [""])[0]
    names = ["AutoModel"]
    for auto_class in _AUTO_CLASSES:
        found = auto_class._model_mapping.get(type(config), ())
        for model_class in found if isinstance(found, tuple) else (found,):
            # Several may make it: those for pretraining and for generation, say.
            name: str = auto_class.__name__
            if model_class.__name__ == saved_as and saved_as.endswith(name.removeprefix("AutoModel")):
                names.append(name)
    return max(names, key=len)


def _new_instance(make_class: Callable[[type], type], original: type) -> Any:
    made: Any = make_class(original)
    return made.__new__(made)


_AUTO_CLASSES = [
    value
    for value in vars(modeling_auto).values()
    if isinstance(value, type) and issubclass(value, _BaseAutoModelClass) and value._model_mapping is not None
]
