"""The routers of a standalone model as its config describes them: written, read back, and checked then.

Configs come from files, and files from anywhere. What one says of routers is checked before modules are made of it.
"""

import dataclasses
import math
from collections.abc import Iterator
from reprlib import repr as shortened
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..probing import LayerProbe
from ..rope import LayerRope, RotaryLayout
from ..rope.frequencies import rope_parameters
from ..routing.router import MoICERouter, check_size
from ..routing.spec import RouterSpec
from .built_in import ROUTERS_NAME, BuiltInRouters


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


def described_specs(description: object) -> list[RouterSpec]:
    """All kinds of routers that a description has.

    Raises:
        ValueError, TypeError: it is not what [`describe_routers`] writes.
    """
    routers = _field(description, "routers", list, "moice")
    return [RouterSpec.from_saved(fields, f"moice.routers[{index}]") for index, fields in enumerate(routers)]


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
        ValueError: the description does not fit the model, or asks for more than any router needs.
        TypeError: a value in it has the wrong type.
    """
    kinds = described_specs(description)
    ropes: dict[tuple[int, str | None, RotaryLayout], LayerRope] = {}
    for described, layer in _field(description, "layers", dict, "moice").items():
        attention = _submodule(model, described)
        name, where = _name_of(model, attention), f"moice.layers[{described!r}]"
        rope_theta = layer.get("rope_theta") if isinstance(layer, dict) else None
        if rope_theta is not None and (isinstance(rope_theta, bool) or not isinstance(rope_theta, (int, float))):
            raise TypeError(f"`{where}` has the rope_theta {shortened(rope_theta)}, which is no number.")
        own = LayerProbe(model).find_rotary(name, rope_theta)
        if own is None:
            raise ValueError(
                f"The config names the attention module {described!r}, but that of {type(model).__name__} has no "
                "rotary embedding. Load the checkpoint with the code of the model that it was saved from."
            )
        rotary = own.module
        num_heads, head_dim = (_count(layer, key, where) for key in ("num_heads", "head_dim"))
        layer_type, direction, length = layer.get("layer_type"), layer.get("direction"), layer.get("original_length")
        specs = _shares(layer, kinds, layer_type, where)
        layout = _layout(layer, head_dim, where)
        if not _has_base_angle(rotary.config, layer_type):
            raise ValueError(
                f"`{where}` has the layer_type {shortened(layer_type)}, of which the model's rotary embedding knows "
                "nothing. Load the checkpoint with the config.json that it was saved with."
            )
        own_theta = rope_parameters(rotary.config, layer_type)["rope_theta"]
        if rope_theta is not None and not math.isclose(rope_theta, own_theta, rel_tol=1e-6):
            raise ValueError(
                f"The routers of {described!r} were made for the rope_theta {rope_theta:.12g}, and the model now has "
                f"{own_theta:.12g}. Load it without another `rope_parameters` or `rope_theta`; or train an adapter "
                "over a base model that has this one."
            )
        if direction not in (1, -1) or not (length is None or (type(length) is int and length > 0)):
            raise ValueError(
                f"`{where}` has the direction {shortened(direction)} and the original_length "
                f"{shortened(length)}, but they have to be 1 or -1, and a number of tokens or null."
            )
        rope = LayerRope(type(rotary), rotary.config, layer_type, layout, direction, length, own=own)
        rope = ropes.setdefault((id(rotary), layer_type, layout), rope)
        check_size(specs, layer_type, num_heads, head_dim, attention)
        yield DescribedLayer(name, attention, rope, specs, num_heads, head_dim)


def install_described(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Give `model` the routers that its config describes, freshly initialized.

    Raises:
        ValueError, TypeError: see [`described_layers`].
    """
    for layer in described_layers(model, description):
        if hasattr(layer.attention, ROUTERS_NAME):
            # A model that builds its decoder through an auto class, which gave it a standalone one.
            continue
        routers = layer.routers()
        for router in routers:
            router.reset_parameters()
        BuiltInRouters(routers, layer.specs, layer.rope, layer.num_heads).install(layer.attention)


def check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise unless reading files has given `model` all that makes it what it was.

    transformers leaves weights that the files lack at a random start, with a warning. That is right for a new head on
    an old decoder, and never for routers or layers.

    Args:
        model: the model that was read.
        info: what transformers says of its reading (`output_loading_info`).

    Raises:
        ValueError: weights are missing or of another shape, or a router's are not finite.
    """
    layers = {f".{name.rpartition('.')[0]}." for name in model.config.moice["layers"]}
    # A decoder alone has names without the part that its owner gives it.
    layers |= {f".{layer.split('.', 2)[2]}" for layer in layers}
    same_head = model.config.architectures == [type(model).__name__]
    mismatched = [key for key, *_ in info.get("mismatched_keys", ())]
    for key in [*sorted(info.get("missing_keys", ())), *mismatched]:
        in_layer = any(f".{key}".startswith(layer) for layer in layers)
        if same_head or in_layer or f".{ROUTERS_NAME}." in key:
            raise ValueError(
                f"The files lack the weight {key!r}, or hold it in another shape. They are damaged, or belong to "
                "another config.json: get them anew, all from the same place."
            )
    for name, module in model.named_modules():
        if isinstance(module, BuiltInRouters) and not all(
            parameter.is_meta or bool(parameter.isfinite().all()) for parameter in module.parameters()
        ):
            raise ValueError(
                f"The routers {name!r} hold values that are not finite. The files are damaged, or training has "
                "failed: get them anew, or merge an earlier checkpoint."
            )


def _shares(layer: dict[str, Any], kinds: list[RouterSpec], layer_type: object, where: str) -> list[RouterSpec]:
    specs = []
    for share in _field(layer, "routers", list, where):
        index, weight = share if isinstance(share, list) and len(share) == 2 else (None, None)
        if type(index) is not int or not 0 <= index < len(kinds):
            raise ValueError(
                f"`{where}` names the router {shortened(share)}, but has to give pairs of an index, 0 to "
                f"{len(kinds) - 1}, and a weight."
            )
        fields = {**dataclasses.asdict(kinds[index]), "weight": weight}
        bases = fields["rope_bases"]
        if (isinstance(bases, dict) and layer_type not in bases) or not isinstance(layer_type, (str, type(None))):
            raise ValueError(
                f"`{where}` has the layer_type {shortened(layer_type)}, of which its routers know nothing."
            )
        specs.append(RouterSpec.from_saved(fields, where))
    if not specs:
        raise ValueError(f"`{where}` names no routers.")
    return specs


def _has_base_angle(config: Any, layer_type: str | None) -> bool:
    try:
        return "rope_theta" in rope_parameters(config, layer_type)
    except KeyError:
        return False


def _layout(layer: dict[str, Any], head_dim: int, where: str) -> RotaryLayout:
    fields = _field(layer, "layout", dict, where)
    start, size, interleaved = (fields.get(key) for key in ("start", "size", "interleaved"))
    if type(start) is not int or type(size) is not int or not isinstance(interleaved, bool) or len(fields) != 3:
        raise TypeError(f"`{where}` has the layout {shortened(fields)}, which is not one of rotated dimensions.")
    if start < 0 or size < 2 or size % 2 or start + size > head_dim:
        raise ValueError(f"`{where}` rotates {size} dimensions from {start} on, but a query has {head_dim}.")
    return RotaryLayout(start, size, interleaved)


def _field(fields: object, key: str, kind: type, where: str) -> Any:
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not kind:
        raise TypeError(
            f"`{where}` of the config has to hold {key!r} as a {kind.__name__}, not {shortened(value)}. Save the "
            "model anew, with `merge_and_unload().save_pretrained(...)`."
        )
    return value


def _count(fields: object, key: str, where: str) -> int:
    value: int = _field(fields, key, int, where)
    if not 1 <= value <= 2**20:
        raise ValueError(f"`{where}` has the {key} {value}, which no model has.")
    return value


def _submodule(model: PreTrainedModel, name: str) -> nn.Module:
    """The module called `name` in the model that was saved, which may have had a head that `model` lacks, or lack
    one that `model` has."""
    modules = dict(model.named_modules())
    found = [other for other in modules if f".{name}".endswith(f".{other}") or other.endswith(f".{name}")]
    if name in modules:
        found = [name]
    if len(found) != 1:
        raise ValueError(
            f"The config names the attention module {shortened(name)}, but {type(model).__name__} has "
            f"{shortened(found) if found else 'none'} in its place. Load the checkpoint with the auto class that "
            "it was saved from."
        )
    submodule: nn.Module = modules[found[0]]
    return submodule


def _name_of(model: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, candidate in model.named_modules() if candidate is module)
    return name
