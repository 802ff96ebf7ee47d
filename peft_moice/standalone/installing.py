"""The routers that a config describes, put into a model, and what was read into them checked."""

import math
from collections.abc import Iterator
from reprlib import repr as shortened
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..probing import LayerProbe
from ..rope import LayerRope, RotaryLayout
from ..routing.mixture import RopesByPosition
from ..routing.router import MoICERouter, check_size
from .built_in import ROUTERS_NAME, BuiltInRouters
from .description import LayerDescription, read_description


class DescribedLayer(NamedTuple):
    """An attention module of a model, and what a config says of the routers built into it.

    Attributes:
        name: the module's name in `model`.
        attention: the module.
        rope: its rotary embedding.
        described: what the config says of it.
        by_position: the ropes of queries by their positions, or None.
    """

    name: str
    attention: nn.Module
    rope: LayerRope
    described: LayerDescription
    by_position: RopesByPosition | None

    def routers(self, num_heads: int) -> list[MoICERouter]:
        """Fresh routers, for so many query heads."""
        specs, head_dim = self.described.specs, self.described.head_dim
        return [MoICERouter.from_spec(spec, self.rope.layer_type, num_heads, head_dim) for spec in specs]


def described_layers(model: PreTrainedModel, description: object) -> Iterator[DescribedLayer]:
    """The attention modules of `model` that `description`, see [`read_description`], gives routers.

    Raises:
        ValueError: the description does not fit the model, or asks for more than any router needs.
        TypeError: a value in it has the wrong type.
    """
    ropes: dict[tuple[int, str | None, RotaryLayout], LayerRope] = {}
    read = read_description(description)
    by_position = RopesByPosition(read.ropes) if read.ropes else None
    for described, layer in read.layers.items():
        name = _name_in(model, described)
        attention = model.get_submodule(name)
        own = LayerProbe(model).find_rotary(name, layer.rope_theta)
        if own is None:
            raise ValueError(
                f"The config names the attention module {described!r}, but that of {type(model).__name__} has no "
                "rotary embedding. Load the checkpoint with the code of the model that it was saved from."
            )
        rotary, layer_type = own.module, layer.layer_type
        own_theta = layer.own_theta(rotary.config, described)
        if layer.rope_theta is not None and not math.isclose(layer.rope_theta, own_theta, rel_tol=1e-6):
            raise ValueError(
                f"The routers of {described!r} were made for the rope_theta {layer.rope_theta:.12g}, and the model "
                f"now has {own_theta:.12g}. Load it without another `rope_parameters` or `rope_theta`; or train an "
                "adapter over a base model that has this one."
            )
        build = (type(rotary), rotary.config, layer_type, layer.layout, layer.direction, layer.original_length)
        rope = ropes.setdefault((id(rotary), layer_type, layer.layout), LayerRope(*build, own=own))
        check_size(layer.specs, layer_type, layer.num_heads, layer.head_dim, attention)
        yield DescribedLayer(name, attention, rope, layer, by_position)


def install_described(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Give `model` the routers that its config describes, freshly initialized.

    Raises:
        ValueError, TypeError: see [`described_layers`].
    """
    for layer in described_layers(model, description):
        if hasattr(layer.attention, ROUTERS_NAME):
            # A model that builds its decoder through an auto class, which gave it a standalone one.
            continue
        specs, num_heads, head_dim, *_ = layer.described
        routers = layer.routers(num_heads)
        for router in routers:
            router.reset_parameters()
        built_in = BuiltInRouters(routers, specs, layer.rope, num_heads, head_dim, layer.by_position)
        built_in.install(layer.attention)


def check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise unless reading files has given `model` all that makes it what it was.

    transformers leaves weights that the files lack at a random start, with a warning. That is right for a new head on
    an old decoder, and never for routers or layers. `info` is what it says of its reading (`output_loading_info`).

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


def _name_in(model: PreTrainedModel, described: str) -> str:
    """The name in `model` of the module that was called `described` in the model that was saved, which may have had a
    head that `model` lacks, or lack one that `model` has."""
    names: list[str] = [name for name, _ in model.named_modules()]
    found = [name for name in names if f".{described}".endswith(f".{name}") or name.endswith(f".{described}")]
    if described in names:
        return described
    if len(found) != 1:
        raise ValueError(
            f"The config names the attention module {shortened(described)}, but {type(model).__name__} has "
            f"{shortened(found) if found else 'none'} in its place. Load the checkpoint with the auto class that "
            "it was saved from."
        )
    return found[0]
