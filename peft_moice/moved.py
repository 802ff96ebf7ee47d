"""Modules that have moved: their old names import them, with a warning, until version 0.4."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]
_MOVED = {
    "angles": "evaluation.angles",
    "callback": "training.callback",
    "config": "tuner.config",
    "data": "training.data",
    "explaining": "evaluation.explaining",
    "layer": "tuner.layer",
    "model": "tuner.model",
    "official": "tuner.official",
    "plotting": "evaluation.plotting",
    "pretraining": "tuner.pretraining",
    "serving": "standalone.vllm",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of this package under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name.partition(".")[0] not in _MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        first, _, rest = module.__name__.partition(".")[2].partition(".")
        new = ".".join(filter(None, (_PACKAGE, _MOVED[first], rest)))
        warnings.warn(
            f"{module.__name__} has moved to {new}; the old name goes in version 0.4.", FutureWarning, stacklevel=2
        )
        # The import system takes what stands here afterwards.
        sys.modules[module.__name__] = importlib.import_module(new)


def find_moved_modules() -> None:
    """Let Python find them. May be called again."""
    if not any(type(finder).__name__ == _MovedModules.__name__ for finder in sys.meta_path):
        # First, since a package that has moved would let others find its modules under the old name.
        sys.meta_path.insert(0, _MovedModules())
