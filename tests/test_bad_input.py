"""Input that cannot mean anything raises an error that names the value and the way out."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import layers_of, load, logits_of, save_tiny_model, wide_config
from torch import nn

from peft_moice import MoICEConfig


def change_weights(adapter, change):
    """Rewrite the adapter's weights with `change`, a function from state dict to state dict."""
    file = f"{adapter}/adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def change_config(adapter, **fields):
    file = Path(adapter, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(exception, *named, call):
    with pytest.raises(exception) as error:
        call()
    for part in named:
        assert part in str(error.value), str(error.value)


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
    refused(ValueError, "typo", call=lambda: call(adapted))
    assert adapted.active_adapters == ["default"]
    assert torch.equal(logits_of(adapted), expected)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward"])
def test_names_that_no_module_can_have(llama, name):
    model = load(llama)
    refused(ValueError, repr(name), call=lambda: get_peft_model(model, wide_config(), adapter_name=name))
    assert_untouched(model, llama)


def test_an_adapter_of_that_name_exists(adapted):
    refused(ValueError, "default", "exists", call=lambda: adapted.add_adapter("default", wide_config()))


def test_surplus_weights(llama, adapter):
    def with_layer_5(state):
        return {**state, **{k.replace("layers.2", "layers.5"): v.clone() for k, v in state.items()}}

    change_weights(adapter, with_layer_5)
    refused(ValueError, "3 weights", "layers.5", call=lambda: PeftModel.from_pretrained(load(llama), adapter))


def test_weights_of_another_tuner(llama, adapter, tmp_path):
    lora = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    lora_weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    change_weights(adapter, lambda state: {**state, **lora_weights})
    refused(ValueError, "lora_A", call=lambda: PeftModel.from_pretrained(load(llama), adapter))


def test_weights_missing_or_of_another_shape_in_transformers_loader(llama, adapter):
    key = "base_model.model.model.layers.0.self_attn.moice_router.down_proj"
    change_weights(adapter, lambda state: {k: v for k, v in state.items() if k != key})
    report = load(llama).load_adapter(adapter)
    assert report.missing_keys == {"model.layers.0.self_attn.moice_router.default.down_proj"}
    change_weights(adapter, lambda state: {**state, key: torch.zeros(5, 4)})
    with pytest.raises(RuntimeError):
        load(llama).load_adapter(adapter)


def test_angles_that_do_not_fit_the_stored_router(llama, adapter):
    bases = PeftConfig.from_pretrained(adapter).rope_bases
    change_config(adapter, rope_bases=[*bases, 7e4])
    refused(
        ValueError,
        "scores 4 angles",
        "names 5",
        "rope_bases",
        call=lambda: PeftModel.from_pretrained(load(llama), adapter),
    )


@pytest.mark.parametrize(
    ("fields", "named"), [({"router_dim": 3}, "router_dim"), ({"router_scope": "head"}, "router_scope")]
)
def test_a_router_shape_that_does_not_fit_the_stored_router(llama, adapter, fields, named):
    change_config(adapter, **fields)
    refused(ValueError, named, call=lambda: PeftModel.from_pretrained(load(llama), adapter))


def test_a_base_with_another_head_size(adapter, tmp_path):
    other = save_tiny_model(tmp_path / "other", head_dim=8)
    refused(ValueError, "size 16", "have 8", call=lambda: PeftModel.from_pretrained(load(other), adapter))


def test_a_base_with_another_number_of_heads(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(router_scope="head"))
    model.save_pretrained(tmp_path / "adapter")
    other = save_tiny_model(tmp_path / "other", num_attention_heads=2, num_key_value_heads=1)
    refused(
        ValueError, "4 query heads", "has 2", call=lambda: PeftModel.from_pretrained(load(other), tmp_path / "adapter")
    )


@pytest.mark.parametrize(("layers", "named"), [(2, "no place for"), (4, "lacks 3 of 12")])
def test_a_base_with_another_number_of_layers(adapter, tmp_path, layers, named):
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=layers)
    refused(ValueError, named, call=lambda: PeftModel.from_pretrained(load(other), adapter))


def test_a_base_with_another_rope_theta(adapter, tmp_path):
    other = save_tiny_model(tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    refused(
        ValueError, "10000.0", "500000.0", "rope_theta", call=lambda: PeftModel.from_pretrained(load(other), adapter)
    )


def test_a_model_that_is_not_transformers():
    refused(ValueError, "Sequential", call=lambda: get_peft_model(nn.Sequential(nn.Linear(2, 2)), MoICEConfig()))


def assert_untouched(model, folder):
    fresh = load(folder)
    assert not layers_of(model)
    assert torch.equal(logits_of(model), logits_of(fresh))
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert not model._forward_hooks and not model._forward_pre_hooks


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
def test_a_config_that_does_not_fit_the_model(llama, adapted, fields, named):
    model = load(llama)
    refused(ValueError, named, call=lambda: get_peft_model(model, wide_config(**fields)))
    assert_untouched(model, llama)

    # Neither does it disturb an adapter that is there already.
    expected = logits_of(adapted)
    refused(ValueError, named, call=lambda: adapted.add_adapter("second", wide_config(**fields)))
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(logits_of(adapted), expected)


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
    refused(ValueError, "model.layers.1.self_attn", "disk", call=lambda: call(llama, adapter, tmp_path / "offload"))


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


def test_adapters_of_another_type(adapted, llama):
    refused(
        ValueError, "MOICE", "LORA", call=lambda: adapted.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    )
    refused(ValueError, "MOICE", call=lambda: get_peft_model(load(llama), wide_config(), mixed=True))
