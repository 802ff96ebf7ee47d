"""What a config says of the routers built into a model: written, and read back with everything checked.

Configs come from files, and files from anywhere. Fields that are not known here mean more than this version computes,
so they are refused.
"""

import dataclasses
from reprlib import repr as shortened
from typing import Any, NamedTuple

from torch import nn

from ..rope import RotaryLayout
from ..rope.frequencies import rope_parameters
from ..rope.rules import RopeExpert, experts_of, rules_of
from ..routing.spec import RouterSpec
from .built_in import ROUTERS_NAME, BuiltInRouters


def describe_routers(model: nn.Module) -> dict[str, Any]:
    """What a config has to record of the routers built into `model`, in JSON's types."""
    routers: list[dict[str, Any]] = []
    layers: dict[str, dict[str, Any]] = {}
    ropes: list[dict[str, Any]] = []
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
            "head_dim": module.head_dim,
            "layer_type": module.rope.layer_type,
            "rope_theta": module.rope.rope_theta,
            "layout": dataclasses.asdict(module.rope.layout),
            "direction": module.rope.direction,
            "original_length": module.rope.original_length,
        }
        if module.ropes_by_position is not None:
            ropes = rules_of(module.ropes_by_position.experts)
    # Versions that know no ropes by position refuse layers without routers.
    return {"routers": routers, "layers": layers, **({"ropes": ropes} if ropes else {})}


class LayerDescription(NamedTuple):
    """What a config says of one attention module.

    Attributes:
        specs: what each of its routers is.
        num_heads: H, its number of query heads.
        head_dim: D, the size of a query.
        layer_type: key into the rope parameters, or None where the model has one set for all layers.
        rope_theta: the model's own base angle when the routers were built in, or None where the file does not say it.
        layout: where the rotated coordinates lie.
        direction: 1 or -1, see [`LayerRope`][peft_moice.rope.LayerRope].
        original_length: in tokens, of rope types whose angles change with the length, else None.
    """

    specs: list[RouterSpec]
    num_heads: int
    head_dim: int
    layer_type: str | None
    rope_theta: float | None
    layout: RotaryLayout
    direction: int
    original_length: int | None

    def own_theta(self, config: Any, name: str) -> float:
        """The model's own base angle by its `config`, in the module called `name`.

        Raises:
            ValueError: the config knows nothing of the layer type.
        """
        try:
            return float(rope_parameters(config, self.layer_type)["rope_theta"])
        except (KeyError, TypeError):
            raise ValueError(
                f"`{_where(name)}` has the layer_type {shortened(self.layer_type)}, of which the model's rotary "
                "embedding knows nothing. Load the checkpoint with the config.json that it was saved with."
            ) from None


class Description(NamedTuple):
    """What [`read_description`] finds.

    Attributes:
        routers: all kinds of routers.
        layers: the attention modules that have some, by their names.
        ropes: the ropes of queries by their positions, in all of these modules; empty where there are none.
    """

    routers: list[RouterSpec]
    layers: dict[str, LayerDescription]
    ropes: tuple[RopeExpert, ...] = ()


def read_description(description: Any) -> Description:
    """`moice` of a config, as [`describe_routers`] wrote it. May be anything.

    Raises:
        ValueError, TypeError: it is not what that writes, or asks for more than any router needs; says what to do.
    """
    routers, layers = _field(description, "routers", list, "moice"), _field(description, "layers", dict, "moice")
    _refuse_unknown(description, {"routers", "layers", "ropes"}, "moice")
    ropes = () if description.get("ropes") is None else experts_of(description["ropes"])
    if not layers:
        raise ValueError("`moice.layers` of the config names no attention module. Merge the adapter again.")
    kinds = [RouterSpec.from_saved(fields, f"moice.routers[{index}]") for index, fields in enumerate(routers)]
    read = {name: _read_layer(layer, kinds, _where(name)) for name, layer in layers.items()}
    bare = [name for name, layer in read.items() if not layer.specs]
    if bare and not ropes:
        raise ValueError(f"`{_where(bare[0])}` names no routers.")
    return Description(kinds, read, ropes)


def _read_layer(layer: object, kinds: list[RouterSpec], where: str) -> LayerDescription:
    fields = layer if isinstance(layer, dict) else {}
    layer_type, rope_theta, direction, length = (
        fields.get(key) for key in ("layer_type", "rope_theta", "direction", "original_length")
    )
    if rope_theta is not None and (isinstance(rope_theta, bool) or not isinstance(rope_theta, (int, float))):
        raise TypeError(f"`{where}` has the rope_theta {shortened(rope_theta)}, which is no number.")
    num_heads, head_dim = (_count(fields, key, where) for key in ("num_heads", "head_dim"))
    specs = _shares(fields, kinds, layer_type, where)
    layout = _layout(fields, head_dim, where)
    if direction not in (1, -1) or not (length is None or (type(length) is int and length > 0)):
        raise ValueError(
            f"`{where}` has the direction {shortened(direction)} and the original_length "
            f"{shortened(length)}, but they have to be 1 or -1, and a number of tokens or null."
        )
    _refuse_unknown(fields, {"routers", *LayerDescription._fields} - {"specs"}, where)
    return LayerDescription(specs, num_heads, head_dim, layer_type, rope_theta, layout, direction, length)


def _where(name: str) -> str:
    return f"moice.layers[{name!r}]"


def _refuse_unknown(fields: Any, known: set[str], where: str) -> None:
    unknown = sorted(map(str, fields.keys() - known))
    if unknown:
        raise ValueError(
            f"`{where}` of the config has the fields {shortened(unknown)}, of which this version of peft_moice knows "
            "nothing. Install the version that the model was saved with, or a later one."
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
    return specs


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
