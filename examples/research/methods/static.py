"""Gates per head that no token changes, over the routers' experts: the control of their choice by token.

Options: those of `routers`, and `equal`, whether all gates stay equal and nothing is trained (False).
"""

import torch
from torch import nn

from methods import routers
from peft_moice import MoICELayer

VARIANTS = {
    "static_temperatures": {"experts": "temperatures"},
    "static_both": {"experts": "both"},
    "equal": {"equal": True},
}


class StaticRouter(nn.Module):
    """Stands in for a router: logits per head that no token changes."""

    def __init__(self, heads: int, experts: int):
        super().__init__()
        self.head_logits = nn.Parameter(torch.zeros(heads, experts))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        return self.head_logits[None, :, None].expand(batch, heads, length, -1)


def make(model: nn.Module, options: dict) -> nn.Module:
    equal = options.get("equal", False)
    adapted = routers.make(model, {**options, "from_equal": equal or options.get("from_equal", False)})
    for layer in adapted.modules():
        if isinstance(layer, MoICELayer):
            router = layer.moice_router["default"]
            static = StaticRouter(layer.num_heads, router.num_experts)
            router.forward = static.forward
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(router, name).requires_grad_(False)
            router.static = static.requires_grad_(not equal)
    return adapted


def freeze_to_best(model: nn.Module) -> None:
    """Give every head of static gates the one expert whose gate is greatest: no mixture is left."""
    for layer in model.modules():
        if isinstance(layer, MoICELayer):
            router = layer.moice_router["default"]
            logits = router.static.head_logits[None, :, None].detach()
            best = router.gates(logits, router.num_experts)[0, :, 0].argmax(-1)
            gates = nn.functional.one_hot(best, router.num_experts).float()
            router.gates = lambda logits, top_k, gates=gates: gates[None, :, None].expand(logits.shape).contiguous()
