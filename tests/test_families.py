"""Families of decoders with rotary embeddings: found by themselves, exact, with and without a cache.

`--all-families` checks every feature on every family that the installed transformers knows. A test that passes is
exact; one that is skipped says who refuses, the library or the base model, and why. .ci/make_support_matrix.py
renders the results.
"""

import pytest
from family_checks import FEATURES, injection, try_feature
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from versions import family as family_case
from versions import needs_transformers

# fmt: off
EXACT = [
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bailing_hybrid", "bamba", "beam", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama",
    "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v", "gpt_neox", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hy_v3", "hyperclovax", "jais2", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama",
    "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "moshi",
    "muse_glimmer", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "persimmon", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu", "zamba2", "zaya",
]
# fmt: on
ALL = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
IN_EVERY_FAMILY = ["one angle", "mixture", "both with a cache"]
"""What is tested on all of `EXACT` in every run; the other features on a few families."""
SAMPLE = ["llama", "gemma3_text", "deepseek_v3", "gpt_neox"]
"""Plain, with sliding layers and angles of their own (these two are not slow), latent, with keywords of its own."""
NEEDS = {
    "cohere_compass_text": needs_transformers("5.21", "asks Cohere Compass for sections of mRoPE"),
    "gemma2": needs_transformers("5.21", "leaves Gemma 2's softcap out of sdpa, and `reference` does not"),
}


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (*([NEEDS[name]] if name in NEEDS else []), *([] if name in SAMPLE[:2] else [pytest.mark.slow]))


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--all-families"):
        cases = [(family, feature) for family in ALL for feature in FEATURES]
    else:
        rest = [feature for feature in FEATURES if feature not in ("positions of images", *IN_EVERY_FAMILY)]
        cases = [(family, feature) for family in EXACT for feature in IN_EVERY_FAMILY]
        cases += [(family, feature) for family in SAMPLE for feature in rest]
        cases += [("qwen2_vl", "positions of images"), ("granite_swa", "merged model reloads")]
        cases += [("paligemma", "bfloat16"), ("llava_onevision", "static cache")]
        cases = [family_case(name, feature, marks=marks_of(name)) for name, feature in cases]
    metafunc.parametrize("family, feature", cases)


def test_feature(family, feature, request, record_property, tmp_path):
    outcome = try_feature(family, feature, tmp_path)
    record_property("status", outcome.status)
    record_property("detail", outcome.detail)
    for name, number in injection(family)[1].items():
        record_property(name, number)
    if request.config.getoption("--all-families") and outcome.status not in ("exact", "not equal"):
        pytest.skip(f"{outcome.status}: {outcome.detail}")
    assert outcome.status == "exact", f"{outcome.status}: {outcome.detail}"
