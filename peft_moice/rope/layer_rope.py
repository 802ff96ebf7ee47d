"""A layer's rotary position embedding, and those that it would have under other base angles."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from .rotation import RotaryLayout, RotationTable, SwitchedTable


@dataclass
class LayerRope:
    """The rotary embedding of a layer, and those it would have under other base angles.

    Attributes:
        rotary: class of the model's rotary embedding module.
        config: the config that the rotary module was built from.
        layer_type: key into `config.rope_parameters` where the model has angles per layer type, else None.
        layout: where the rotated coordinates lie.
        direction: 1 if queries turn with their position as in the paper's equation, -1 if against it.
        original_length: with rope type longrope, the number of tokens up to which the short factors hold, else None.
        is_long: whether the long factors hold, a bool or a scalar tensor; see [`longrope.rope_of_pass`].
    """

    rotary: type[nn.Module]
    config: object
    layer_type: str | None
    layout: RotaryLayout
    direction: int = 1
    original_length: int | None = None
    is_long: bool | torch.Tensor = False
    _tables: dict[tuple, RotationTable] = field(default_factory=dict, repr=False)

    @property
    def rope_theta(self) -> float:
        """The model's own base angle in this layer."""
        return float(rope_parameters(self.config, self.layer_type)["rope_theta"])

    def table(self, rope_bases: tuple[float, ...]) -> RotationTable:
        """The rotations that turn the model's own angle into each of `rope_bases`."""
        if isinstance(self.is_long, torch.Tensor):
            return SwitchedTable(self._table(rope_bases, False), self._table(rope_bases, True), self.is_long)
        return self._table(rope_bases, self.is_long)

    def prepare(self, rope_bases: tuple[float, ...]) -> None:
        """Build all tables for `rope_bases` now, because a compiled forward pass could not."""
        self._table(rope_bases, False)
        if self.original_length is not None:
            self._table(rope_bases, True)

    def with_factors(self, is_long: bool | torch.Tensor) -> "LayerRope":
        """The same rotary embedding under its long factors, or under its short ones. Tables are shared."""
        return LayerRope(
            self.rotary,
            self.config,
            self.layer_type,
            self.layout,
            self.direction,
            self.original_length,
            is_long,
            self._tables,
        )

    def _table(self, rope_bases: tuple[float, ...], is_long: bool) -> RotationTable:
        key = (rope_bases, is_long)
        if key not in self._tables:
            own, *others = (
                inverse_frequencies(self.rotary, self.config, self.layer_type, base, is_long)[0]
                for base in (self.rope_theta, *rope_bases)
            )
            deltas = torch.stack([other - own for other in others])
            self._tables[key] = RotationTable(self.direction * deltas, self.layout)
        return self._tables[key]


def rope_parameters(config: object, layer_type: str | None) -> dict:
    """The rope parameters that hold for `layer_type` (None where a model has one set for all layers)."""
    parameters = config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def original_length(config: object, layer_type: str | None) -> int | None:
    """The number of tokens up to which the angles of a rope type that changes them at run time stay as they are.

    None for rope types whose angles never change.
    """
    parameters = rope_parameters(config, layer_type)
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "longrope":
        return parameters["original_max_position_embeddings"]
    return config.max_position_embeddings if "dynamic" in rope_type else None


def rotary_with_theta(rotary: type[nn.Module], config: object, layer_type: str | None, rope_theta: float) -> nn.Module:
    """A rotary embedding of the same kind, built on the CPU with another `rope_theta` and nothing else changed."""
    config = copy.deepcopy(config)
    rope_parameters(config, layer_type)["rope_theta"] = rope_theta
    with torch.device("cpu"):
        return rotary(config)


@torch.no_grad()
def inverse_frequencies(
    rotary: type[nn.Module], config: object, layer_type: str | None, rope_theta: float, is_long: bool = False
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[P]` in float64 and the attention scaling of the model's rope type under `rope_theta`.

    With `is_long`, those that it changes to beyond the original length.
    """
    module = rotary_with_theta(rotary, config, layer_type, rope_theta)
    if is_long:
        options = {} if layer_type is None else {"layer_type": layer_type}
        with torch.device("cpu"):
            module(torch.zeros(1, 1, 1), torch.tensor([[original_length(config, layer_type)]]), **options)
    prefix = "" if layer_type is None else f"{layer_type}_"
    scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
    return getattr(module, f"{prefix}inv_freq").double(), float(scaling)
