"""MoICE for PEFT: attention heads that mix several rotary base angles, chosen per token by small routers.

Importing this package registers the PEFT type `MOICE`. What only some need (measuring, pictures, the Trainer callback)
is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .config import MoICEConfig
from .hub import push_to_hub, write_model_card
from .layer import MoICELayer
from .model import MoICEModel
from .official import load_official_checkpoint
from .registration import register
from .self_check import check
from .stacking import unwrapped
from .training import BalanceLossMixin, KeepCloseMixin, collect_balance_loss
from .versions import warn_of_untested_versions

if TYPE_CHECKING:
    from . import angles, evaluation, plotting, pretraining
    from .callback import MoICECallback
    from .explaining import Explanation, explain
    from .pretraining import add_routers

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

_MODULE_OF = {
    "Explanation": "explaining",
    "MoICECallback": "callback",
    "add_routers": "pretraining",
    "angles": None,
    "evaluation": None,
    "explain": "explaining",
    "plotting": None,
    "pretraining": None,
}
"""Where lazy names are; None for those that are modules themselves."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    value = importlib.import_module(f".{name if module is None else module}", __name__)
    if module is not None:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_untested_versions()
register()
