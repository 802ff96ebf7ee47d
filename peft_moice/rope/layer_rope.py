"""A layer's rotary position embedding, and those that it would have under other rope parameters."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from .frequencies import frequencies_under, inverse_frequencies, rope_parameters
from .own_rotary import OwnRotary
from .rotation import NEVER, FarRopes, RotaryLayout, RotationTable, SwitchedTable
from .rules import Parameters, RopeExpert

Experts = tuple[float | Parameters | RopeExpert, ...]
"""What the experts of a layer are: base angles, ropes that hold everywhere, or ropes by position and distance."""

_MAX_UNUSED = 4
"""Tables kept for sets of experts that no adapter has on its own."""


@dataclass
class LayerRope:
    """The rotary embedding of a layer, and those it would have under other rope parameters.

    Attributes:
        rotary: class of the model's rotary embedding module.
        config: the config that the rotary module was built from.
        layer_type: key into `config.rope_parameters` where the model has angles per layer type, else None.
        layout: where the rotated coordinates lie.
        direction: 1 if queries rotate with their position as in the paper's equation, -1 if against it.
        original_length: with rope type longrope, the number of tokens up to which the short factors hold, else None.
        is_long: whether the long factors hold, a bool or a scalar tensor; see [`longrope.rope_of_pass`].
        own: the model's rotary embedding, watched for changes, or None.

    Tables of rotations are kept for the sets of experts that an adapter of some layer has (see [`prepare`]), and
    for the last few others that passes asked for, as combinations of adapters do.
    """

    rotary: type[nn.Module]
    config: object
    layer_type: str | None
    layout: RotaryLayout
    direction: int = 1
    original_length: int | None = None
    is_long: bool | torch.Tensor = False
    own: OwnRotary | None = field(default=None, repr=False)
    _tables: dict[tuple[Experts, bool], RotationTable] = field(default_factory=dict, repr=False)
    _num_users: Counter[Experts] = field(default_factory=Counter, repr=False)

    @property
    def rope_theta(self) -> float:
        """The model's own base angle in this layer."""
        return float(rope_parameters(self.config, self.layer_type)["rope_theta"])

    def table(self, experts: Experts) -> RotationTable:
        """The rotations that bring the model's own rope into that of each expert.

        Raises:
            ValueError: the model's rotary embedding is no longer the one that they start from.
        """
        disagreement = None if self.own is None else self.own.disagreement(self.layer_type)
        if disagreement is not None:
            raise ValueError(
                f"The model's rotary embedding has changed since its adapter was added: {disagreement}, and MoICE "
                "goes on from the latter. Put the rotary embedding back as it was; or remove the adapter, make config "
                "and rotary embedding agree, and add it again."
            )
        if isinstance(self.is_long, torch.Tensor):
            return SwitchedTable(self._table(experts, False), self._table(experts, True), self.is_long)
        return self._table(experts, self.is_long)

    def check_config(self) -> None:
        """Raise a ValueError if the config no longer gives the frequencies that the layer rotates by."""
        if self.own is not None and self.own.holder is not None:
            reread = OwnRotary(self.own.holder, self.own.attribute).disagreement(self.layer_type)
            if reread is not None:
                raise ValueError(
                    f"The config of the model's rotary embedding was changed after an adapter was added: {reread}. "
                    "Put its rope parameters back as they were, and add the adapter again."
                )

    def prepare(self, experts: Experts) -> None:
        """Keep the tables for `experts` until [`release`], and build them now: compiled passes could not."""
        self._num_users[experts] += 1
        self._table(experts, False)
        if self.original_length is not None:
            self._table(experts, True)

    def release(self, experts: Experts) -> None:
        """Undo one [`prepare`]. Tables that nobody else keeps are freed, with those of past combinations."""
        self._num_users[experts] -= 1
        if self._num_users[experts] <= 0:
            del self._num_users[experts]
            for key in self._unused():
                del self._tables[key]

    def _table(self, experts: Experts, is_long: bool) -> RotationTable:
        key = (experts, is_long)
        if key not in self._tables:
            for oldest in self._unused()[: -_MAX_UNUSED + 1]:
                del self._tables[oldest]
            self._tables[key] = self._make_table(experts, is_long)
        return self._tables[key]

    def _make_table(self, experts: Experts, is_long: bool) -> RotationTable:
        build = (self.rotary, self.config, self.layer_type)
        own, own_scaling = inverse_frequencies(*build, self.rope_theta, is_long)
        near, far, factors = [], [], []
        for expert in experts:
            if isinstance(expert, tuple):
                expert = RopeExpert(expert)
            if isinstance(expert, RopeExpert):
                both = expert.near, expert.far or expert.near
                found = [frequencies_under(*build, dict(rope), expert.first) for rope in both]
                near.append(found[0][0] - own)
                far.append(found[1][0] - own)
                # Cosines and sines carry a rope's attention scaling, so that scores have its square.
                factors.append([(scaling / own_scaling) ** 2 for _, scaling in found])
            else:
                near.append(inverse_frequencies(*build, expert, is_long)[0] - own)
                far.append(torch.zeros_like(own))
                factors.append([1.0, 1.0])
        deltas, of_near, of_far = self.direction * torch.stack(near), *zip(*factors, strict=True)
        starts = tuple(expert.start if isinstance(expert, RopeExpert) else NEVER for expert in experts)
        if set(starts) == {NEVER} and set(of_near) == {1.0}:
            return RotationTable(deltas, self.layout)
        far_ropes = FarRopes(self.direction * torch.stack(far), starts, (*of_near, *of_far))
        return RotationTable(deltas, self.layout, far_ropes)

    def _unused(self) -> list[tuple[Experts, bool]]:
        """Keys of the tables that no adapter keeps, the oldest first."""
        return [key for key in self._tables if key[0] not in self._num_users]
