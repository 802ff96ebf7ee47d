"""Caches, prompts in pieces, padding and packing, and the ways to generate text: what the adapter computes stays the
same."""

import itertools

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from position_models import assert_close, mixture
from representatives import slow_but
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from versions import needs_transformers

from peft_moice import MoICEConfig

pytestmark = pytest.mark.usefixtures("no_grad")

NEEDS_FP8 = needs_transformers("5.21", "has no caches in fp8")

FAMILIES = ["llama", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt_neox"]
"""Plain, sliding, sliding and full in turn, the same with sinks, latent, and with keywords of its own."""
HYBRID = ["lfm2", "qwen3_next", "falcon_h1"]
"""Convolutions, linear attention and state spaces, whose states share the cache with keys."""
GENERATING = [*itertools.product(FAMILIES, [None, "static", "dynamic"]), *((family, None) for family in HYBRID)]


def generated(model, ids: torch.Tensor, new_tokens: int = 12, **options) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def greedy(model, ids: torch.Tensor, new_tokens: int = 12) -> torch.Tensor:
    """Greedy search without a cache."""
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return ids


def static_cache(model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=32)


def dynamic_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def unaware_cache(model) -> DynamicCache:
    """A cache that keeps everything, whatever the layers' windows are."""
    return DynamicCache()


@pytest.mark.parametrize("make_cache", [dynamic_cache, unaware_cache, static_cache])
@pytest.mark.parametrize("family", slow_but(["gemma3_text"], FAMILIES))
@pytest.mark.parametrize("pieces", [(17, 1, 1, 1), (5, 6, 7, 2), pytest.param((1,) * 20, marks=pytest.mark.slow)])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(family, make_cache, pieces):
    model, ids = mixture(family), tokens()
    cache, logits, start = make_cache(model), [], 0
    for piece in ids.split(pieces, dim=1):
        position_ids = torch.arange(start, start + piece.shape[1])[None].expand(piece.shape)
        output = model(piece, position_ids=position_ids, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        start += piece.shape[1]
    assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "backend", [pytest.param("fp8", marks=NEEDS_FP8), "hqq", pytest.param("quanto", marks=pytest.mark.slow)]
)
def test_quantized_keys_are_turned_like_any_others(backend):
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    options = {} if backend == "fp8" else {"q_group_size": 16, "residual_length": 4, "nbits": 4}
    ids, logits = tokens(), {}
    for implementation in ("auto", "reference"):
        model = mixture("llama", implementation=implementation)
        cache = QuantizedCache(backend, model.config, **options)
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split((16, 2, 1, 1), 1)]
        logits[implementation] = torch.cat(pieces, dim=1)
    assert_close(logits["auto"], logits["reference"])
    exact = model(ids, use_cache=False).logits
    error = (logits["auto"] - exact).abs().mean() / exact.abs().mean()
    assert 0 < error < 0.2


@NEEDS_FP8
def test_one_angle_with_quantized_keys_is_close_to_a_model_with_that_rope_theta():
    """The one keeps its keys under its own angle, the other under the new one, so they round differently."""
    ids, errors = tokens(), []
    exact = tiny_model("llama", theta_factor=4.0)(ids, use_cache=False).logits
    models = (
        tiny_model("llama", theta_factor=4.0),
        get_peft_model(tiny_model("llama"), MoICEConfig(base_multipliers=[4.0])),
    )
    for model in models:
        cache = QuantizedCache("fp8", model.config)
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split((16, 2, 1, 1), 1)]
        errors.append((torch.cat(pieces, dim=1) - exact).abs().mean().item())
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize(("family", "cache"), slow_but(GENERATING[:3], GENERATING))
def test_generation_equals_search_without_a_cache(family, cache):
    model, ids = mixture(family), tokens(length=11)
    options = {} if cache is None else {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    assert torch.equal(generated(model, ids, **options), greedy(model, ids))


@pytest.mark.parametrize("family", slow_but(["llama"], FAMILIES))
def test_left_padded_rows_equal_single_rows(family):
    model, ids = mixture(family), tokens(batch=3, length=11)
    lengths = (11, 7, 4)
    mask = torch.stack([torch.arange(11) >= 11 - length for length in lengths]).long()
    padded = ids * mask
    output = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, length in enumerate(lengths):
        alone = generated(model, ids[row : row + 1, 11 - length :], new_tokens=8)
        assert torch.equal(output[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_packed_sequences_equal_separate_ones(family):
    model, ids = mixture(family), tokens(batch=1, length=20)
    lengths = (9, 4, 7)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    separate = [model(piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)]
    assert_close(packed, torch.cat(separate, dim=1))


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "top_k": 20}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["sampling", "beams"],
)
def test_generation_does_not_depend_on_the_cache(options):
    model, ids = mixture("llama"), tokens(length=9)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(generated(model, ids, use_cache=use_cache, **options))
    assert torch.equal(*texts)


def test_prompt_lookup_and_assistants_do_not_change_greedy_text():
    model, assistant = mixture("llama"), tiny_model("llama", num_hidden_layers=1, eos_token_id=None)
    ids = tokens(batch=1, length=6).repeat(1, 3)
    expected = generated(model, ids)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generated(model, ids, assistant_model=assistant), expected)


def test_input_embeddings_give_the_text_of_their_tokens():
    model, ids = mixture("llama"), tokens(length=9)
    embeddings = model.get_input_embeddings()(ids)
    output = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(output, generated(model, ids, new_tokens=8)[:, 9:])


def test_a_cache_filled_with_the_adapter_serves_the_base_model_and_back():
    """The cache holds the base model's keys, so each step depends on whether the adapter is on in that step only."""
    model, ids = mixture("llama", layers_to_transform=[1]), tokens(length=12)
    on = model(ids, use_cache=False).logits
    with model.disable_adapter():
        off = model(ids, use_cache=False).logits
    assert (on - off).abs().max() > 1e-2 * on.abs().max()

    # Only the last layer is adapted, so no later key depends on the adapter.
    cache = DynamicCache(config=model.config)
    assert_close(model(ids[:, :10], past_key_values=cache, use_cache=True).logits, on[:, :10])
    own = DynamicCache(config=model.config)
    with model.disable_adapter():
        model(ids[:, :10], past_key_values=own, use_cache=True)
    for layer, own_layer in zip(cache.layers, own.layers, strict=True):
        assert torch.equal(layer.keys, own_layer.keys) and torch.equal(layer.values, own_layer.values)
    with model.disable_adapter():
        assert_close(model(ids[:, 10:11], past_key_values=cache, use_cache=True).logits, off[:, 10:11])
    assert_close(model(ids[:, 11:], past_key_values=cache, use_cache=True).logits, on[:, 11:])


@pytest.mark.slow
@needs_transformers("5.19", "lets continuous batching write its cache in another way, which is refused")
@pytest.mark.parametrize("attention", ["sdpa", "paged|eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_continuous_batching_gives_the_text_of_single_prompts(family, attention):
    model = mixture(family)
    prompts = [tokens(batch=1, length=length, seed=length) for length in (11, 5, 3)]
    expected = [generated(model, prompt, new_tokens=8)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    base = model.get_base_model()
    base.set_attn_implementation(attention)
    outputs = base.generate_batch(
        inputs=[prompt[0].tolist() for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=16),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == expected
