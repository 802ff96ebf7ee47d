"""MoICE for PEFT: attention heads that mix several rotary base angles, chosen per token by small routers.

Importing this package registers the PEFT type `MOICE`. What only some need (measuring, pictures, the Trainer callback)
is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .hub.push import push_to_hub, write_model_card
from .moved import find_moved_modules
from .training import BalanceLossMixin, KeepCloseMixin, collect_balance_loss
from .tuner.check import check
from .tuner.config import MoICEConfig
from .tuner.layer import MoICELayer
from .tuner.model import MoICEModel
from .tuner.official import load_official_checkpoint
from .tuner.registration import register
from .tuner.stacking import unwrapped
from .tuner.versions import warn_of_untested_versions

if TYPE_CHECKING:
    from . import evaluation
    from .evaluation import angles, plotting
    from .evaluation.explaining import Explanation, explain
    from .training.callback import MoICECallback
    from .tuner import pretraining
    from .tuner.pretraining import add_routers

__version__ = "0.2.0"

__all__ = [
    "BalanceLossMixin",
    "Explanation",
    "KeepCloseMixin",
    "MoICECallback",
    "MoICEConfig",
    "MoICELayer",
    "MoICEModel",
    "__version__",
    "add_routers",
    "angles",
    "check",
    "collect_balance_loss",
    "evaluation",
    "explain",
    "load_official_checkpoint",
    "plotting",
    "pretraining",
    "push_to_hub",
    "unwrapped",
    "write_model_card",
]

_LATE = {
    "Explanation": "evaluation.explaining:Explanation",
    "MoICECallback": "training.callback:MoICECallback",
    "add_routers": "tuner.pretraining:add_routers",
    "angles": "evaluation.angles",
    "evaluation": "evaluation",
    "explain": "evaluation.explaining:explain",
    "plotting": "evaluation.plotting",
    "pretraining": "tuner.pretraining",
}
"""Where names are that are imported when they are asked for: a module, or a name in one."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LATE[name].partition(":")
    value: Any = importlib.import_module(f".{module}", __name__)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


find_moved_modules()
warn_of_untested_versions()
register()
