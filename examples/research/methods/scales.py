"""No mixture: the model's own angle and a learned temperature. A control of this project.

Option: `by_token`, whether each token has one of its own, by a network as small as a router (False).
"""

import torch
from models import head_dim_of
from torch import nn

VARIANTS = {"scales_by_token": {"by_token": True}}


class QueryScale(nn.Module):
    """exp(scale) of each head's query before rotation: one number per head, or one per head and token."""

    def __init__(self, heads: int, head_dim: int, by_token: bool, hidden: int = 5):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.by_token, self.enabled = by_token, True
        if by_token:
            self.gate_proj = nn.Parameter(torch.randn(hidden, head_dim) * 0.02)
            self.up_proj = nn.Parameter(torch.randn(hidden, head_dim) * 0.02)
            self.down_proj = nn.Parameter(torch.zeros(heads, hidden))

    def forward(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return output
        query = output.unflatten(-1, (self.heads, self.head_dim))
        log_scale = self.log_scale
        if self.by_token:
            hidden = nn.functional.silu(query @ self.gate_proj.mT) * (query @ self.up_proj.mT)
            log_scale = log_scale + (hidden * self.down_proj).sum(-1).clamp(-1.5, 1.5)
        return (query * log_scale.exp()[..., None]).flatten(-2)


def make(model: nn.Module, options: dict) -> nn.Module:
    if not hasattr(model, "peft_config"):
        model.requires_grad_(False)
    heads, head_dim = model.config.num_attention_heads, head_dim_of(model)
    for module in list(model.modules()):
        projection = module._modules.get("q_proj")
        if projection is not None:
            module.query_scale = QueryScale(heads, head_dim, options.get("by_token", False))
            projection.register_forward_hook(module.query_scale)
    return model
