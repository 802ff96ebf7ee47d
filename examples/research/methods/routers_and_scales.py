"""Routers, and a learned query scale beside them. Options: those of both."""

from torch import nn

from methods import routers, scales

VARIANTS = {"routers_and_scales_by_token": {"by_token": True}}


def make(model: nn.Module, options: dict) -> nn.Module:
    return scales.make(routers.make(model, options), options)
