"""Input that cannot mean anything raises an error that names the value and the way out."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from representatives import slow_but
from safetensors.torch import load_file, save_file
from tiny_models import layers_of, load, logits_of, save_tiny_model, wide_config
from torch import nn

from peft_moice import MoICEConfig


def change_weights(adapter, change):
    """Rewrite the adapter's weights with `change`, a function from state dict to state dict."""
    file = f"{adapter}/adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def refused(*named, call):
    with pytest.raises(ValueError) as error:
        call()
    for part in named:
        assert part in str(error.value), str(error.value)


def load_over(adapter: str, base: str) -> None:
    PeftModel.from_pretrained(load(base), adapter)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter("typo"),
        lambda model: model.base_model.set_adapter("typo"),
        lambda model: model.base_model.set_adapter(["default", "typo"]),
        lambda model: model.set_requires_grad("typo"),
        lambda model: model.delete_adapter("typo"),
        lambda model: model.save_pretrained("unused", selected_adapters=["typo"]),
    ],
)
def test_an_adapter_that_does_not_exist(adapted, call):
    expected = logits_of(adapted)
    refused("typo", call=lambda: call(adapted))
    assert adapted.active_adapters == ["default"]
    assert torch.equal(logits_of(adapted), expected)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward"])
def test_names_that_no_module_can_have(llama, name):
    model = load(llama)
    refused(repr(name), call=lambda: get_peft_model(model, wide_config(), adapter_name=name))
    assert not layers_of(model) and torch.equal(logits_of(model), logits_of(load(llama)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        # Those of one more layer.
        (lambda state: {k.replace("layers.2", "layers.5"): v.clone() for k, v in state.items()}, ["3 w", "layers.5"]),
        # Of another tuner.
        (lambda state: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}, ["lora_A"]),
    ],
)
def test_surplus_weights(llama, adapter, change, named):
    change_weights(adapter, lambda state: {**state, **change(state)})
    refused(*named, call=lambda: load_over(adapter, llama))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_bases": [1e4, 2.5e3, 5e3, 4e4, 7e4]}, ["scores 4 angles", "names 5", "rope_bases"]),
        ({"router_dim": 3}, ["router_dim"]),
        ({"router_scope": "head"}, ["router_scope"]),
    ],
)
def test_fields_that_do_not_fit_the_stored_router(llama, adapter, fields, named):
    file = Path(adapter, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    refused(*named, call=lambda: load_over(adapter, llama))


OTHER_BASES = [
    ({"head_dim": 8}, ["size 16", "have 8"]),
    ({"num_hidden_layers": 2}, ["no place for"]),
    ({"num_hidden_layers": 4}, ["lacks 3 of 12"]),
    ({"num_attention_heads": 2, "num_key_value_heads": 1}, ["4 query heads", "has 2"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["10000.0", "500000.0", "rope_theta"]),
]


@pytest.mark.parametrize(("overrides", "named"), slow_but(OTHER_BASES[:2], OTHER_BASES))
def test_another_base(llama, tmp_path, overrides, named):
    scope = "head" if "num_attention_heads" in overrides else "layer"
    get_peft_model(load(llama), wide_config(router_scope=scope)).save_pretrained(tmp_path / "adapter")
    other = save_tiny_model(tmp_path / "other", **overrides)
    refused(*named, call=lambda: load_over(tmp_path / "adapter", other))


def test_a_model_that_is_not_transformers():
    refused("Sequential", call=lambda: get_peft_model(nn.Sequential(nn.Linear(2, 2)), MoICEConfig()))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ["attention"]}, "attention"),
        ({"target_modules": r".*layers\.9\.self_attn"}, "9"),
        ({"target_modules": ["mlp"]}, "model.layers.0.mlp"),
        ({"target_modules": ["q_proj", "v_proj"]}, "q_proj"),
        ({"exclude_modules": ["self_attn"]}, "exclude_modules"),
        ({"layers_to_transform": [3]}, "3"),
        ({"layers_to_transform": [0, 3]}, "layer 3"),
        ({"implementation": "fastest"}, "fastest"),
        ({"rope_bases": [5e5, 1e6], "base_multipliers": None, "top_k": None}, "500000.0"),
        ({"rope_bases": {"sliding_attention": [1e4, 2e4]}, "base_multipliers": None}, "sliding_attention"),
    ],
)
def test_a_config_that_does_not_fit_the_model(llama, fields, named):
    refused(named, call=lambda: get_peft_model(load(llama), wide_config(**fields)))


def on_disk(folder, offload, *names, **kwargs):
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    device_map = {part: "disk" if part in names else "cpu" for part in [*parts, "model.rotary_emb"]}
    return load(folder, device_map=device_map, offload_folder=offload, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda base, adapter, offload: get_peft_model(on_disk(base, offload, "model.layers.1"), wide_config()),
        lambda base, adapter, offload: PeftModel.from_pretrained(on_disk(base, offload, "model.layers.1"), adapter),
        lambda base, adapter, offload: on_disk(base, offload, "model.layers.1").load_adapter(adapter),
        lambda base, adapter, offload: on_disk(adapter, offload, "model.layers.1"),
    ],
)
def test_attention_weights_on_disk(llama, adapter, tmp_path, call):
    refused("model.layers.1.self_attn", "disk", call=lambda: call(llama, adapter, tmp_path / "offload"))


@pytest.mark.parametrize("part", ["lm_head", "model.norm"])
def test_other_weights_may_be_on_disk(llama, adapted, adapter, tmp_path, part):
    model = on_disk(llama, tmp_path / "offload", part)
    model.load_adapter(adapter)
    assert torch.equal(logits_of(model), logits_of(adapted))


def test_a_merged_model_may_be_on_disk(adapted, tmp_path):
    expected = logits_of(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    model = on_disk(tmp_path / "merged", tmp_path / "offload", "model.layers.1")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_added(adapted, llama):
    refused("default", "exists", call=lambda: adapted.add_adapter("default", wide_config()))
    lora = LoraConfig(target_modules=["q_proj"])
    refused("MOICE", "LORA", call=lambda: adapted.add_adapter("lora", lora))
    refused("MOICE", call=lambda: get_peft_model(load(llama), wide_config(), mixed=True))
