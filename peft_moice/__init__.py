"""MoICE for PEFT: attention heads that mix several rotary base angles, chosen per token by small routers.

Importing this package registers the PEFT type `MOICE`.
"""

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

__version__ = "0.2.0"

__all__ = [
    "BalanceLossMixin",
    "KeepCloseMixin",
    "MoICEConfig",
    "MoICELayer",
    "MoICEModel",
    "__version__",
    "check",
    "collect_balance_loss",
    "load_official_checkpoint",
    "push_to_hub",
    "unwrapped",
    "write_model_card",
]

warn_of_untested_versions()
register()
