"""References to modules that do not keep them alive."""

import weakref
from typing import Any

from torch import nn


class WeakModule:
    """Refers to `module` without keeping it alive, so that a model that refers to itself is freed with its last name.

    In a deep copy or a pickle of the module, it refers to the copy.
    """

    def __init__(self, module: nn.Module | None):
        self._reference = None if module is None else weakref.ref(module)

    def __call__(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakModule":
        module = self()
        return WeakModule(memo.get(id(module), module))

    def __reduce__(self) -> tuple[type["WeakModule"], tuple[nn.Module | None]]:
        return WeakModule, (self(),)
