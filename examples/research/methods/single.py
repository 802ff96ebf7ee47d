"""The model under one other rope base, untrained: what a single expert of a mixture does alone.

Option: `multiplier` of the model's own base (4.0).
"""

import torch
from models import rotary_of
from torch import nn

VARIANTS = {f"single_{multiplier:g}": {"multiplier": multiplier} for multiplier in (0.25, 0.5, 2.0, 4.0)}


def make(model: nn.Module, options: dict) -> nn.Module:
    inv_freq = rotary_of(model).inv_freq
    inv_freq.copy_(under(inv_freq, options.get("multiplier", 4.0)))
    return model.requires_grad_(False)


def under(inv_freq: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Inverse frequencies `[D / 2]` under that multiple of their base."""
    exponents = torch.arange(len(inv_freq), device=inv_freq.device) / len(inv_freq)
    return inv_freq * multiplier**-exponents
