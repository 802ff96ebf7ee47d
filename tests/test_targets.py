"""Which modules the fields of a config select, saved, reloaded and beside other adapters."""

import copy

import pytest
import torch
from families import tiny_model, tokens
from peft import PeftModel, get_peft_model
from representatives import slow_but
from torch import nn
from transformers import AutoModel, MoonshineForConditionalGeneration, NomicBertModel

from peft_moice import MoICEConfig, MoICELayer


def config(**options) -> MoICEConfig:
    return MoICEConfig(**{"base_multipliers": [1.0, 4.0, 0.25], "init_weights": False, **options})


def adapted(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Names of the attention modules that have routers of the adapter."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, MoICELayer) and adapter_name in m.moice_router]
    return [name.removeprefix("base_model.model.") for name, _ in layers]


def smollm3() -> nn.Module:
    """Four layers, the last without a rotary embedding."""
    return tiny_model("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])


LAYERS = {
    "llama": (lambda: tiny_model("llama"), "model.layers.{}.self_attn"),
    "a layer without rotary embedding": (smollm3, "model.layers.{}.self_attn"),
    "a vision tower": (lambda: tiny_model("llava"), "model.language_model.layers.{}.self_attn"),
    "no head": (lambda: AutoModel.from_config(tiny_model("llama").config), "layers.{}.self_attn"),
}


@pytest.mark.parametrize("kind", slow_but(["llama", "no head"], LAYERS))
@pytest.mark.parametrize("in_full", [False, True])
def test_layers_to_transform(kind, in_full, tmp_path):
    make, name = LAYERS[kind]
    targets = {"target_modules": [name.format(0), name.format(1)]} if in_full else {}
    model = get_peft_model(make(), config(layers_to_transform=[1], **targets))
    assert adapted(model) == [name.format(1)]
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(make(), tmp_path)) == [name.format(1)]

    model.add_adapter("second", config(layers_to_transform=0, **targets))
    assert adapted(model, "second") == [name.format(0)]
    assert adapted(model) == [name.format(1)]


def test_layers_pattern_with_automatic_targets():
    model = get_peft_model(smollm3(), config(layers_to_transform=[2], layers_pattern="layers"))
    assert adapted(model) == ["model.layers.2.self_attn"]
    with pytest.raises(ValueError, match=r"'layers_to_transform': \[2\], 'layers_pattern': 'blocks'"):
        get_peft_model(smollm3(), config(layers_to_transform=[2], layers_pattern="blocks"))


@pytest.mark.parametrize("layers", [[3], [0, 3]])
def test_layers_without_rotary_embedding_cannot_be_asked_for(layers):
    model = smollm3()
    with pytest.raises(ValueError, match="rotary embedding"):
        get_peft_model(model, config(layers_to_transform=layers))
    assert not adapted(model)


@pytest.mark.parametrize("excluded", [["layers.0.self_attn", "3.self_attn"], r".*layers\.(0|3)\..*"])
def test_exclude_modules_with_automatic_targets(excluded, tmp_path):
    expected = ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    model = get_peft_model(smollm3(), config(exclude_modules=excluded))
    assert adapted(model) == expected
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(smollm3(), tmp_path)) == expected


def test_what_is_left_out_is_not_probed():
    """The way out that errors name, `exclude_modules`, works with automatic targets."""

    def hunyuan_beside_llama() -> nn.Module:
        model = tiny_model("llama")
        other = tiny_model("hunyuan_v1_dense")
        model.model.layers[1].self_attn = other.model.layers[1].self_attn
        return model

    with pytest.raises(ValueError, match="exclude_modules"):
        get_peft_model(hunyuan_beside_llama(), config())
    for fields in ({"exclude_modules": ["1.self_attn"]}, {"layers_to_transform": [0]}):
        assert adapted(get_peft_model(hunyuan_beside_llama(), config(**fields))) == ["model.layers.0.self_attn"]


def test_parts_of_attention_as_targets_are_told_the_attention_modules():
    with pytest.raises(ValueError, match=r"q_proj' \(Linear\), .*'model\.layers\.0\.self_attn'.*\['self_attn'\]"):
        get_peft_model(tiny_model("llama"), config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"mlp' .*target_modules=\['attention'\]"):
        get_peft_model(tiny_model("gpt_neox"), config(target_modules=["mlp"]))


def moonshine(theta_factor: float = 1.0) -> MoonshineForConditionalGeneration:
    """With other angles in its decoder alone."""
    sizes = {"hidden_layers": 2, "attention_heads": 4, "key_value_heads": 4}
    sides = {f"{side}_num_{what}": count for side in ("encoder", "decoder") for what, count in sizes.items()}
    model = tiny_model(MoonshineForConditionalGeneration, **sides, decoder_start_token_id=1)
    rotary, config = model.model.decoder.rotary_emb, copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] *= theta_factor
    model.model.decoder.rotary_emb = type(rotary)(config)
    return model


@torch.no_grad()
def test_cross_attention_that_does_not_say_so_is_left_out():
    batch = {
        "input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": tokens(),
    }
    model = get_peft_model(moonshine(), config(base_multipliers=[3.0])).eval()
    assert adapted(model) == ["model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"]
    expected = moonshine(theta_factor=3.0)(**batch).logits
    assert (moonshine()(**batch).logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_encoders_whose_attention_has_no_place_in_a_cache():
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[1, 15:] = 0
    expected = tiny_model(NomicBertModel, theta_factor=3.0)(ids, attention_mask=mask).last_hidden_state
    model = get_peft_model(tiny_model(NomicBertModel), config(base_multipliers=[3.0])).eval()
    assert not hasattr(model.get_base_model().get_submodule(adapted(model)[0]).base_layer, "layer_idx")
    actual = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    merged = model.merge_and_unload()(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(merged[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_a_place_in_a_cache_that_cannot_be_told_is_refused():
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ValueError, match=r"takes a cache \(`(cache|past_key_values)`\), but has no `layer_idx`"):
        get_peft_model(model, config())
