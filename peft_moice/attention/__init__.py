"""The operator: attention under several rotary base angles, mixed by gates."""

from .interface import Mixture, intercept, restore
from .operator import IMPLEMENTATIONS, mixed_attention

__all__ = ["IMPLEMENTATIONS", "Mixture", "intercept", "mixed_attention", "restore"]
