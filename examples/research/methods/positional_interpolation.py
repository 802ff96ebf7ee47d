"""Positional Interpolation (Chen et al., arXiv 2306.15595): all positions divided by one factor.

Options: `factor` (2.0); `train`, whether the model's weights are trained under it, as in the paper (False).
"""

from models import rotary_of
from torch import nn


def make(model: nn.Module, options: dict) -> nn.Module:
    rotary_of(model).inv_freq.div_(options.get("factor", 2.0))
    return model.requires_grad_(options.get("train", False))
