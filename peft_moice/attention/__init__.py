"""The operator: attention under several rotary base angles, mixed by gates."""

from .interface import MixtureCall, bypassed, exchange_config, intercept, own_config, restore
from .operator import IMPLEMENTATIONS, known_implementation, mixed_attention

__all__ = [
    "IMPLEMENTATIONS",
    "MixtureCall",
    "bypassed",
    "exchange_config",
    "intercept",
    "known_implementation",
    "mixed_attention",
    "own_config",
    "restore",
]
