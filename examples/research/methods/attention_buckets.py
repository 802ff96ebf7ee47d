"""Attention Buckets (Chen et al., arXiv 2312.04455): the model under several rope bases, the surest weighing most.

Option: `multipliers` of the model's own base (those of the five angles of `routers`).
"""

import copy

import torch
from models import rotary_of
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from methods.routers import ANGLES
from methods.single import under
from peft_moice.evaluation.reader import cache_keyword
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

VARIANTS = {"attention_buckets_released": {"multipliers": RELEASED_MULTIPLIERS}}


class Buckets(nn.Module):
    """One model, read once under each base; its probabilities are averaged with weights softmax(greatest probability).

    Each base has a cache of its own, kept in step with the one that the caller passes.
    """

    def __init__(self, model: nn.Module, multipliers: list[float]):
        super().__init__()
        self.model, self.config = model, model.config
        self.rotary = rotary_of(model)
        self.inv_freqs = [under(self.rotary.inv_freq, multiplier) for multiplier in multipliers]
        self.caches: list[DynamicCache] = []
        self.passed: DynamicCache | None = None

    def forward(self, input_ids: torch.Tensor, past_key_values=None, use_cache=None, logits_to_keep=0):
        caches: list[DynamicCache | None] = [None] * len(self.inv_freqs)
        if past_key_values is not None:
            if past_key_values is not self.passed:
                self.passed = past_key_values
                self.caches = [past_key_values, *(copy.deepcopy(past_key_values) for _ in self.inv_freqs[1:])]
            caches = [*self.caches]
            length = past_key_values.get_seq_length()
            for cache in self.caches[1:]:
                if cache.get_seq_length() > length:
                    cache.crop(length - cache.get_seq_length())
        log_probs = []
        for inv_freq, cache in zip(self.inv_freqs, caches, strict=True):
            self.rotary.inv_freq = inv_freq
            options = {"use_cache": cache is not None, "logits_to_keep": logits_to_keep}
            out = self.model(input_ids=input_ids, **options, **{cache_keyword(self.model): cache})
            log_probs.append(out.logits.float().log_softmax(-1))
        stacked = torch.stack(log_probs)
        weights = stacked.amax(-1, keepdim=True).exp().log_softmax(0)
        return CausalLMOutputWithPast(logits=(stacked + weights).logsumexp(0))


def make(model: nn.Module, options: dict) -> nn.Module:
    multipliers = options.get("multipliers", [angle for angle, _ in ANGLES])
    return Buckets(model.requires_grad_(False), multipliers)
