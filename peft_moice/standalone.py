"""Whole models with routers built in: their classes and configs, and how they are written and read.

A standalone model is an instance of a subclass of its own class, made on demand: `LlamaForCausalLM` becomes
`MoICELlamaForCausalLM`, its config `MoICELlamaConfig` with the model type "moice" and the family's own in
`base_model_type`. Without `import peft_moice`, transformers refuses the model type; it cannot mistake the model for
the base model.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .attention import exchange_config, own_config
from .built_in import ROUTERS_NAME, BuiltInRouters
from .config import RouterSpec
from .mixture import watch_positions
from .probing import LayerProbe
from .rope import LayerRope, RotaryLayout
from .router import MoICERouter
from .self_check import watch_first_pass
from .training import register_hooks, remove_hooks

MODEL_TYPE = "moice"


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
    _exchange_config(model, model.config, config)
    model.__class__ = standalone_model_class(original)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), ROUTERS_NAME}
    return model


def _exchange_config(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for module in model.modules():
        if isinstance(module, BuiltInRouters):
            if module.rope.config is old:
                module.rope.config = new
        elif hasattr(module, "config") and own_config(module) is old:
            exchange_config(module, new)


def describe_routers(model: nn.Module) -> dict[str, Any]:
    """What a config has to record of the routers built into `model`, in JSON's types."""
    routers: list[dict[str, Any]] = []
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BuiltInRouters):
            continue
        shares = []
        for spec in module.router_specs:
            fields = dataclasses.asdict(spec)
            weight = fields.pop("weight")
            if fields not in routers:
                routers.append(fields)
            shares.append([routers.index(fields), weight])
        layers[name.removesuffix(f".{ROUTERS_NAME}")] = {
            "routers": shares,
            "num_heads": module.num_heads,
            "head_dim": module[0].head_dim,
            "layer_type": module.rope.layer_type,
            "rope_theta": module.rope.rope_theta,
            "layout": dataclasses.asdict(module.rope.layout),
            "direction": module.rope.direction,
            "original_length": module.rope.original_length,
        }
    return {"routers": routers, "layers": layers}


class DescribedLayer(NamedTuple):
    """An attention module of a model, and what a config says of the routers built into it.

    Attributes:
        name: the module's name in `model`.
        attention: the module.
        rope: its rotary embedding.
        specs: what each of its routers is.
        num_heads: H, its number of query heads.
        head_dim: D, the size of a query.
    """

    name: str
    attention: nn.Module
    rope: LayerRope
    specs: list[RouterSpec]
    num_heads: int
    head_dim: int

    def routers(self, num_heads: int | None = None) -> list[MoICERouter]:
        """Fresh routers, for all H heads or for `num_heads` of them."""
        heads = self.num_heads if num_heads is None else num_heads
        return [MoICERouter.from_spec(spec, self.rope.layer_type, heads, self.head_dim) for spec in self.specs]


def described_layers(model: PreTrainedModel, description: dict[str, Any]) -> Iterator[DescribedLayer]:
    """The attention modules of `model` that `description`, see [`describe_routers`], gives routers.

    Raises:
        ValueError: `model` has no such module, or it has no rotary embedding.
    """
    ropes: dict[tuple[int, str | None, RotaryLayout], LayerRope] = {}
    for described, layer in description["layers"].items():
        attention = _submodule(model, described)
        name = _name_of(model, attention)
        own = LayerProbe(model).find_rotary(name, layer.get("rope_theta"))
        if own is None:
            raise ValueError(
                f"The config names the attention module {described!r}, but that of {type(model).__name__} has no "
                "rotary embedding. Load the checkpoint with the code of the model that it was saved from."
            )
        rotary = own.module
        layer_type, layout, direction = layer["layer_type"], RotaryLayout(**layer["layout"]), layer["direction"]
        length = layer.get("original_length")
        rope = LayerRope(type(rotary), rotary.config, layer_type, layout, direction, length, own=own)
        rope = ropes.setdefault((id(rotary), layer_type, layout), rope)
        specs = [RouterSpec(**description["routers"][index], weight=weight) for index, weight in layer["routers"]]
        yield DescribedLayer(name, attention, rope, specs, layer["num_heads"], layer["head_dim"])


def install_described(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Give `model` the routers that its config describes, freshly initialized."""
    for layer in described_layers(model, description):
        if hasattr(layer.attention, ROUTERS_NAME):
            # A model that builds its decoder through an auto class, which gave it a standalone one.
            continue
        routers = layer.routers()
        for router in routers:
            router.reset_parameters()
        BuiltInRouters(routers, layer.specs, layer.rope, layer.num_heads).install(layer.attention)


def _submodule(model: PreTrainedModel, name: str) -> nn.Module:
    """The module called `name` in the model that was saved, which may have had a head that `model` lacks, or lack
    one that `model` has."""
    modules = dict(model.named_modules())
    found = [other for other in modules if f".{name}".endswith(f".{other}") or other.endswith(f".{name}")]
    if name in modules:
        found = [name]
    if len(found) != 1:
        raise ValueError(
            f"The config names the attention module {name!r}, but {type(model).__name__} has {found or 'none'} in its "
            "place. Load the checkpoint with the auto class that it was saved from."
        )
    submodule: nn.Module = modules[found[0]]
    return submodule


def _name_of(model: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, candidate in model.named_modules() if candidate is module)
    return name


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
        moice: dict[str, Any] | None = None

        original_class = original

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_instance, (standalone_config_class, original), self.__dict__

    StandaloneConfig.__name__ = StandaloneConfig.__qualname__ = f"MoICE{original.__name__}"
    for auto_class in _AUTO_CLASSES:
        if original in auto_class._model_mapping:
            found = auto_class._model_mapping[original]
            for model_class in found if isinstance(found, tuple) else (found,):
                auto_class.register(StandaloneConfig, _model_class(model_class, StandaloneConfig), exist_ok=True)
    return StandaloneConfig


def standalone_model_class(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of standalone models whose base is of class `original`."""
    return _model_class(original, standalone_config_class(_config_class_of(original)))


def _config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    assert model_class.config_class is not None  # only abstract classes have none
    return model_class.config_class


@_made_once
def _model_class(original: type[PreTrainedModel], standalone_config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    class StandaloneModel(original):  # type: ignore[misc, valid-type]  # a base known at run time only
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
            watch_first_pass(self)

        @classmethod
        def is_custom_code(cls) -> bool:
            # transformers leaves out the initialization of some buffers in models that are not its own.
            return original.is_custom_code()

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_instance, (standalone_model_class, original), self.__dict__

    StandaloneModel.__name__ = StandaloneModel.__qualname__ = f"MoICE{original.__name__}"
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


def _new_instance(make_class: Callable[[type], type], original: type) -> Any:
    made: Any = make_class(original)
    return made.__new__(made)


_AUTO_CLASSES = [
    value
    for value in vars(modeling_auto).values()
    if isinstance(value, type) and issubclass(value, _BaseAutoModelClass) and value._model_mapping is not None
]
