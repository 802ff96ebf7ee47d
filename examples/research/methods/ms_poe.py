"""Ms-PoE (Zhang et al., arXiv 2403.04797): positions divided by 1.2 for the most position-aware head of a layer, up to
1.8 for the least.

As in its official code a head's awareness is the share of keys to which the last query gives over four times the mean,
without rotation, and the first two layers stay as they are. The order is found once, on ordinary text; theirs on each
prompt. Option: `tokenizer`, for that text (else its characters are taken for tokens).
"""

import random

import torch
from forms import docstrings
from torch import nn

from methods import geometry_per_head

RATIOS = (1.2, 1.8)
FIRST_LAYER = 2


@torch.no_grad()
def make(model: nn.Module, options: dict) -> nn.Module:
    model = geometry_per_head.make(model, {"learned": ()})
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
    model(input_ids=ids.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    heads, head_dim = model.config.num_attention_heads, 2 * len(model.model.rotary_emb.inv_freq)
    low, high = RATIOS
    ratios = low + (high - low) * torch.arange(heads, device=model.device) / heads
    for index, layer in enumerate(model.model.layers):
        if index < FIRST_LAYER:
            continue
        query = seen[index, "q_proj"][0, -1].float().view(heads, head_dim)
        key = seen[index, "k_proj"][0].float().unflatten(-1, (-1, head_dim))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        probs = (torch.einsum("hd,thd->ht", query, key) * head_dim**-0.5).softmax(-1)
        awareness = (probs > 4 * probs.mean(-1, keepdim=True)).float().mean(-1)
        layer.self_attn.head_geometry.positions[awareness.argsort(descending=True)] = ratios.log()
    return model
