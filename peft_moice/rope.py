"""Rotary position embeddings: where a layer's rotated coordinates lie, and how to turn them to another base angle.

A key in the cache carries the model's own rotation. Rotations compose, so expert j needs only the further rotation by
the difference of the inverse frequencies, `R(θ_j) = R(θ_j - θ_0) R(θ_0)`, and only differences of positions matter.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

_MIN_TABLE_LENGTH = 256


@dataclass(frozen=True)
class RotaryLayout:
    """Which dimensions of a query or key vector are rotated, and how they pair up.

    Attributes:
        start: first rotated dimension (0, or D - size for latent attention).
        size: number of rotated dimensions, twice the number P of angles.
        interleaved: pairs are (0, 1), (2, 3), ... if true, (0, P), (1, P + 1), ... if false.
    """

    start: int
    size: int
    interleaved: bool


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Rotate the coordinate pairs of `x` `[..., S, D]` by the angles behind `cos` and `sin` `[..., S, P]`.

    Leading dimensions are broadcast. Works in float32 and returns the dtype of `x`.
    """
    before, rotated, after = x.split([layout.start, layout.size, x.shape[-1] - layout.start - layout.size], dim=-1)
    rotated = rotated.to(torch.promote_types(x.dtype, torch.float32))
    if layout.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(turned, dim=-1).flatten(-2) if layout.interleaved else torch.cat(turned, dim=-1)
    turned = turned.to(x.dtype)
    if layout.size == x.shape[-1]:
        return turned
    leading = turned.shape[:-1]
    return torch.cat((before.expand(*leading, -1), turned, after.expand(*leading, -1)), dim=-1)


class RotationTable:
    """Cosines and sines of the further rotations of N experts, shared by all layers with the same angles.

    Args:
        deltas: `[N, P]` float64, inverse frequencies of each expert minus the model's own, in radians per position.
        layout: where the rotated coordinates lie.

    Tables grow with the longest sequence seen and take N · T · P · 8 bytes per device. They are left out of copies
    and pickles.
    """

    def __init__(self, deltas: torch.Tensor, layout: RotaryLayout):
        self.deltas = deltas
        self.layout = layout
        self.is_identity = (deltas == 0).all(dim=-1).tolist()
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getstate__(self):
        return {**self.__dict__, "_tables": {}}

    def __deepcopy__(self, memo):
        return self

    @property
    def num_experts(self) -> int:
        return self.deltas.shape[0]

    def cos_sin(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at positions 0 to `length` - 1, each `[N, length, P]` in float32 on `device`."""
        if torch.compiler.is_compiling():
            # A compiled graph must not grow a table that outlives it.
            positions = torch.arange(length, dtype=torch.float64, device=device)
            return _cos_sin(positions, self.deltas.to(device))
        table = self._tables.get(device)
        if table is None or table[0].shape[1] < length:
            padded = max(_MIN_TABLE_LENGTH, 1 << (length - 1).bit_length())
            # The table outlives this pass, so a pass in inference mode must not make it unfit for training.
            with torch.inference_mode(False):
                table = _cos_sin(torch.arange(padded, dtype=torch.float64), self.deltas)
                table = self._tables[device] = tuple(t.to(device) for t in table)
        return table[0][:, :length], table[1][:, :length]


class SwitchedTable(RotationTable):
    """Two tables, and on the device which of them holds.

    Args:
        short: taken where `is_long` is false.
        long: taken where `is_long` is true.
        is_long: scalar of booleans.
    """

    def __init__(self, short: RotationTable, long: RotationTable, is_long: torch.Tensor):
        # Not by the base class, which reads values, as compiled code could not.
        self.layout = short.layout
        self.deltas = short.deltas
        self.is_identity = short.is_identity
        self.short = short
        self.long = long
        self.is_long = is_long

    def cos_sin(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        is_long = self.is_long.to(device)
        pairs = zip(self.long.cos_sin(length, device), self.short.cos_sin(length, device), strict=True)
        return tuple(torch.where(is_long, long, short) for long, short in pairs)


def _cos_sin(positions: torch.Tensor, deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[None, :, None] * deltas[:, None, :]
    return angles.cos().float(), angles.sin().float()


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
