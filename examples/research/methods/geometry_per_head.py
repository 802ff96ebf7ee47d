"""What every head has once and for all, whatever the token: a rope base, a scale of positions, a query scale.

Free at inference: a head's queries and keys are rotated by its own frequencies in place of the model's. A control of
this project.

Option: `learned`, which of "base", "positions" and "scale" are trained (all).
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARIANTS = {
    "base_per_head": {"learned": ("base",)},
    "base_and_scale_per_head": {"learned": ("base", "scale")},
}


class HeadGeometry(nn.Module):
    """Frequencies and query scale of every head of a layer, `[H]` each, as logarithms; zeros are the model's own.

    Args:
        inv_freq: `[D / 2]`, the model's own inverse frequencies, with pairs half a head apart (Llama).
        learned: which of "base", "positions" and "scale" are trained.
    """

    def __init__(self, heads: int, inv_freq: torch.Tensor, learned: tuple[str, ...]):
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.double().float(), persistent=False)
        for name in ("base", "positions", "scale"):
            zeros = torch.zeros(heads, device=inv_freq.device)
            setattr(self, name, nn.Parameter(zeros, requires_grad=name in learned))
        self.enabled = True

    def cos_sin(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the further rotations, `[H, T, D / 2]` each."""
        exponents = torch.arange(len(self.inv_freq), device=self.inv_freq.device) / len(self.inv_freq)
        change = torch.expm1(-exponents * self.base[:, None] - self.positions[:, None])
        positions = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angles = positions[:, None] * (self.inv_freq * change)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[B, H, S, D]`, the last of T, and keys `[B, G, T, D]`; returned with H heads each."""
        cos, sin = self.cos_sin(key.shape[2])
        start = key.shape[2] - query.shape[2]
        query = _rotate(query, cos[:, start:], sin[:, start:]) * self.scale.exp()[:, None, None].to(query.dtype)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query, _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(module, query, key, value, attention_mask, **options):
    """sdpa of the transformers library, after the heads' own rotation."""
    geometry = getattr(module, "head_geometry", None)
    if geometry is not None and geometry.enabled:
        query, key = geometry(query, key)
        groups = query.shape[1] // value.shape[1]
        value = value.repeat_interleave(groups, dim=1)
        module = _Ungrouped(module)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


class _Ungrouped:
    """An attention module as sdpa looks at it, with as many key-value heads as heads."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module):
        self.is_causal, self.training = module.is_causal, module.training


def make(model: nn.Module, options: dict) -> nn.Module:
    AttentionInterface.register("per_head", attend)
    AttentionMaskInterface.register("per_head", sdpa_mask)
    model.requires_grad_(False)
    model.set_attn_implementation("per_head")
    inv_freq = model.model.rotary_emb.inv_freq
    for layer in model.model.layers:
        layer.self_attn.head_geometry = HeadGeometry(
            model.config.num_attention_heads, inv_freq, options.get("learned", ("base", "positions", "scale"))
        )
    return model
