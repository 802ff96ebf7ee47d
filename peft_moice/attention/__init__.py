"""The operator: attention under several rotary base angles, mixed by gates."""

from .interface import MixtureCall, bypassed, exchange_config, intercept, own_config, restore
from .operator import IMPLEMENTATIONS, mixed_attention, observing_choices

__all__ = [
    "IMPLEMENTATIONS",
    "MixtureCall",
    "bypassed",
    "exchange_config",
    "intercept",
    "mixed_attention",
    "observing_choices",
    "own_config",
    "restore",
]
