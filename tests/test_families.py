"""Every family of decoders with rotary embeddings: found by itself, exact, with and without a cache."""

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from transformers import DynamicCache
from versions import family, needs_transformers

from peft_moice import MoICEConfig

# fmt: off
EXACT = [
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bailing_hybrid", "bamba", "beam", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama",
    "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_neox", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hy_v3", "hyperclovax", "jais2", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama",
    "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "moshi",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text",
    "recurrent_gemma", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
    "zamba2", "zaya",
]
# fmt: on
NEEDS = {
    "cohere_compass_text": needs_transformers("5.21", "asks Cohere Compass for sections of mRoPE"),
    "gemma2": needs_transformers("5.21", "leaves Gemma 2's softcap out of sdpa, and `reference` does not"),
}
OTHERWISE_WITH_CACHE = ("moshi", "zamba2")
"""Families whose base model computes something else with a cache than without."""


def one_angle(factor: float) -> MoICEConfig:
    return MoICEConfig(base_multipliers=[factor])


def mixture(**options) -> MoICEConfig:
    """Three angles, two of them per token, with routers that decide from the start."""
    return MoICEConfig(base_multipliers=[1.0, 4.0, 0.25], top_k=2, init_weights=False, **options)


def adapted(model, config: MoICEConfig):
    torch.manual_seed(1)
    return get_peft_model(model, config).eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", [family(name, marks=NEEDS.get(name, ())) for name in EXACT])
@torch.no_grad()
def test_one_angle_equals_a_model_with_that_rope_theta(family):
    ids = tokens()
    model, turned = tiny_model(family), tiny_model(family, theta_factor=3.0)
    expected = turned(ids).logits
    assert relative_error(model(ids).logits, expected) > 1e-4, "the angle does not matter here"
    model = adapted(model, one_angle(3.0))
    assert relative_error(model(ids).logits, expected) < 1e-5
    assert relative_error(logits_with_cache(model, ids), logits_with_cache(turned, ids)) < 1e-5


@pytest.mark.parametrize("family", [family(name, marks=NEEDS.get(name, ())) for name in EXACT])
@torch.no_grad()
def test_mixture_equals_reference(family):
    ids = tokens()
    model = adapted(tiny_model(family), mixture())
    reference = adapted(tiny_model(family), mixture(implementation="reference"))
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-5
    cached = logits_with_cache(model, ids)
    assert relative_error(cached, logits_with_cache(reference, ids)) < 1e-5
    if family not in OTHERWISE_WITH_CACHE:
        assert relative_error(cached, model(ids).logits) < 1e-5


def logits_with_cache(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids`, all but the last three of which are fed at once and the rest one by one."""
    # MiniMax makes a cache of its own kind.
    config = model.config.get_text_config(decoder=True)
    cache = None if config.model_type == "minimax" else DynamicCache(config=config)
    logits, start = [], 0
    for piece in ids.split((ids.shape[1] - 3, 1, 1, 1), dim=1):
        # Passed as generation does, because some families start from 0 at every call.
        position_ids = torch.arange(start, start + piece.shape[1])[None].expand(piece.shape)
        output = model(piece, position_ids=position_ids, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", cache)
        start += piece.shape[1]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)
