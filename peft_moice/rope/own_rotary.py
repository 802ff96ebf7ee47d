"""The rotary embedding module of a model, and whether it rotates by the frequencies that its config gives."""

from typing import Any

import torch
from torch import nn

from .frequencies import inverse_frequencies, original_length, rope_parameters
from .keys_left import version_of
from .weak_module import WeakModule

_RELATIVE_TOLERANCE = 1e-5


class OwnRotary:
    """A rotary embedding of the model and where it hangs, so that another one in its place is noticed.

    A deep copy of the model watches the copy's rotary embedding; what comes out of a pickle watches none.

    Args:
        holder: the module that it hangs on, which is not kept alive. None where there is none to watch.
        attribute: its name there.
    """

    def __init__(self, holder: nn.Module | None, attribute: str):
        self.attribute = attribute
        self._holder = WeakModule(holder)
        # Per layer type: the frequencies that were accepted, and the buffer that they were read from, between its name
        # in the module and its version.
        self._accepted: dict[str | None, torch.Tensor] = {}
        self._seen: dict[str | None, tuple[str, torch.Tensor, int | None]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnRotary":
        copied = OwnRotary(memo.get(id(self.holder), self.holder), self.attribute)
        copied._accepted = dict(self._accepted)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_holder": WeakModule(None), "_seen": {}}

    @property
    def holder(self) -> nn.Module | None:
        """The module that the rotary embedding hangs on, as long as the model is there."""
        return self._holder()

    @property
    def module(self) -> nn.Module:
        """The rotary embedding that the model has now."""
        rotary: nn.Module = getattr(self.holder, self.attribute)
        return rotary

    def disagreement(self, layer_type: str | None) -> str | None:
        """How the frequencies differ from those that the config gives or gave when this was asked first.

        Reads no values while the same buffer lies there untouched. None where they agree, or cannot be known yet.
        """
        holder = self._holder()
        if torch.compiler.is_compiling() or holder is None:
            return None
        rotary: nn.Module = getattr(holder, self.attribute)
        known = self._seen.get(layer_type)
        if known is not None and getattr(rotary, known[0], None) is known[1] and version_of(known[1]) == known[2]:
            return None
        name = _name_of_frequencies(rotary, layer_type)
        buffer: torch.Tensor = getattr(rotary, name)
        if buffer.is_meta:
            return None
        if layer_type not in self._accepted:
            rope_theta = rope_parameters(rotary.config, layer_type)["rope_theta"]
            self._accepted[layer_type], _ = inverse_frequencies(
                type(rotary), rotary.config, layer_type, float(rope_theta)
            )
        accepted = self._accepted[layer_type]
        if _agree(buffer, accepted):
            self._seen[layer_type] = (name, buffer, version_of(buffer))
            return None
        return (
            f"`{self.attribute}` ({type(rotary).__name__}) rotates by the inverse frequencies {_ends(buffer)}, but "
            f"its config gives {_ends(accepted)}"
        )


def _name_of_frequencies(rotary: nn.Module, layer_type: str | None) -> str:
    """The attribute with the inverse frequencies `[P]` that `rotary` starts from."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    # Rope types that change at run time overwrite `inv_freq`.
    original = f"{prefix}original_inv_freq"
    is_fixed = original_length(rotary.config, layer_type) is None or not hasattr(rotary, original)
    return f"{prefix}inv_freq" if is_fixed else original


def _agree(buffer: torch.Tensor, frequencies: torch.Tensor) -> bool:
    """Whether `buffer` holds `frequencies` up to the rounding of its dtype and to the arithmetic of its device."""
    if buffer.shape != frequencies.shape:
        return False
    info = torch.finfo(buffer.dtype)
    rtol, atol = max(_RELATIVE_TOLERANCE, info.eps), info.smallest_normal * info.eps
    return torch.allclose(buffer.detach().double().cpu(), frequencies.cpu(), rtol=rtol, atol=atol)


def _ends(frequencies: torch.Tensor) -> str:
    values = [f"{value:.6g}" for value in frequencies.detach().flatten().tolist()]
    return ", ".join(values if len(values) <= 4 else (*values[:2], "...", values[-1]))
