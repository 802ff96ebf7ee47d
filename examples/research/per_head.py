"""What every head has once and for all, whatever the token: a rope base, a scale of positions, a query scale.

Free at inference: a head's queries and keys are rotated by its own frequencies in place of the model's.
"""

import math
import random

import torch
from forms import docstrings
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MS_POE_RATIOS = (1.2, 1.8)
"""Positions are divided by these, from the most to the least position-aware head (Ms-PoE, arXiv 2403.04797)."""
MS_POE_FIRST_LAYER = 2


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
            setattr(self, name, nn.Parameter(torch.zeros(heads), requires_grad=name in learned))
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
        query = _rotate(query, cos[:, start:], sin[:, start:]) * self.scale.exp()[:, None, None]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query, _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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


def per_head(model: nn.Module, options: dict) -> nn.Module:
    """A model each of whose heads has a geometry of its own."""
    AttentionInterface.register("per_head", attend)
    AttentionMaskInterface.register("per_head", sdpa_mask)
    model.requires_grad_(False)
    model.set_attn_implementation("per_head")
    inv_freq = model.model.rotary_emb.inv_freq
    for layer in model.model.layers:
        layer.self_attn.head_geometry = HeadGeometry(
            model.config.num_attention_heads, inv_freq, options.get("learned", ())
        )
    return model


def single_base(model: nn.Module, options: dict) -> nn.Module:
    """Every head under the same rope base, `multiplier` times the model's own."""
    model = per_head(model, {})
    for layer in model.model.layers:
        layer.self_attn.head_geometry.base.fill_(math.log(options["multiplier"]))
    return model


@torch.no_grad()
def ms_poe(model: nn.Module, options: dict) -> nn.Module:
    """Ms-PoE: positions divided by 1.2 for the most position-aware head of a layer, up to 1.8 for the least.

    As in its official code a head's awareness is the share of keys to which the last query gives over four times the
    mean, without rotation, and the first two layers stay as they are. The order is found once, on ordinary text;
    theirs on each prompt.
    """
    model = per_head(model, {})
    text = docstrings()
    start = random.Random(0).randrange(len(text) - 6000)
    ids = torch.tensor([[ord(c) % model.config.vocab_size for c in text[start : start + 1000]]])
    tokenizer = options.get("tokenizer")
    if tokenizer is not None:
        ids = torch.tensor([tokenizer(text[start : start + 6000], add_special_tokens=False)["input_ids"][:1000]])
    seen: dict[str, torch.Tensor] = {}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, args, output, key=(index, name): seen.__setitem__(key, output)
        )
        for index, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    heads, head_dim = model.config.num_attention_heads, 2 * len(model.model.rotary_emb.inv_freq)
    low, high = MS_POE_RATIOS
    ratios = low + (high - low) * torch.arange(heads) / heads
    for index, layer in enumerate(model.model.layers):
        if index < MS_POE_FIRST_LAYER:
            continue
        query = seen[index, "q_proj"][0, -1].float().view(heads, head_dim)
        key = seen[index, "k_proj"][0].float().unflatten(-1, (-1, head_dim))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        probs = (torch.einsum("hd,thd->ht", query, key) * head_dim**-0.5).softmax(-1)
        awareness = (probs > 4 * probs.mean(-1, keepdim=True)).float().mean(-1)
        layer.self_attn.head_geometry.positions[awareness.argsort(descending=True)] = ratios.log()
    return model
