"""Rotary position embeddings: rotations, a layer's base angles, and where tokens stand."""

from .layer_rope import LayerRope
from .rotation import RotaryLayout, RotationTable, rotate

__all__ = ["LayerRope", "RotaryLayout", "RotationTable", "rotate"]
