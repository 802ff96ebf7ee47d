"""Routers over a model whose query projections have LoRA, trained together. Options: those of both."""

from torch import nn

from methods import lora, routers

VARIANTS = {"lora_below_routers": {"equal_size": True, "rates": {"lora_": 0.1}}}


def make(model: nn.Module, options: dict) -> nn.Module:
    adapted = routers.make(lora.make(model, options).base_model.model, options)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return adapted
