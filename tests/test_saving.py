"""Saving adapters and loading them, with the calls of PEFT and of transformers."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from representatives import slow_but
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    WIDE,
    adapted_model,
    decide,
    load,
    logits_of,
    router_state,
    token_ids,
    train_step,
    two_adapters,
    wide_config,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_moice import MoICEConfig


@pytest.mark.parametrize("family", slow_but(["llama"], FAMILIES))
@pytest.mark.parametrize("overrides", [{}, {"router_scope": "head", "init_weights": "identity", "router_dim": 3}])
def test_a_saved_adapter_loads_into_an_equal_model(bases, tmp_path, family, overrides):
    model = adapted_model(bases[family], **overrides)
    expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(load(bases[family])), atol=1e-3)
    model.save_pretrained(tmp_path)

    for loaded in (
        PeftModel.from_pretrained(load(bases[family]), tmp_path),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits_of(loaded), expected)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_file_holds_the_routers_and_nothing_else(adapter):
    keys = set(load_file(f"{adapter}/adapter_model.safetensors"))
    assert keys == {
        f"base_model.model.model.layers.{index}.self_attn.moice_router.{name}"
        for index in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_the_saved_config_holds_resolved_values(llama, adapted, adapter):
    own = LlamaConfig.from_pretrained(llama).rope_parameters["rope_theta"]
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, MoICEConfig)
    assert config.rope_bases == [multiple * own for multiple in WIDE]
    assert config.base_multipliers is None
    assert (config.top_k, config.router_dim, config.hidden_act) == (2, 4, "silu")
    assert config.base_model_name_or_path == llama
    assert config.inference_mode
    expected = adapted.peft_config["default"].to_dict()
    assert {**config.to_dict(), "inference_mode": False} == expected
    assert json.loads(Path(adapter, "adapter_config.json").read_text())["peft_type"] == "MOICE"


def test_several_adapters_are_saved_apart_and_load_under_other_names(llama, tmp_path):
    model = two_adapters(llama)
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = logits_of(model)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    assert not (tmp_path / "one").exists()
    assert len(load_file(tmp_path / "two" / "adapter_model.safetensors")) == 9
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load(llama), tmp_path / "two", adapter_name="b")
    loaded.load_adapter(tmp_path / "one", adapter_name="a")
    assert torch.equal(logits_of(loaded), expected["two"])
    loaded.set_adapter("a")
    assert torch.equal(logits_of(loaded), expected["one"])


@pytest.mark.slow
def test_adapter_names_that_look_like_parts_of_keys(llama, tmp_path):
    for name in ("gate_proj", "model", "0", "moice", "self_attn"):
        model = get_peft_model(load(llama), wide_config(), adapter_name=name).eval()
        decide(model, name)
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "saved" / name, adapter_name=name)
        assert torch.equal(logits_of(loaded), logits_of(model)), name


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_puts_routers_where_they_belong(llama, adapter, dtype, autocast, low_cpu_mem_usage):
    options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(load(llama, dtype=dtype), adapter, **options)
    model.load_adapter(adapter, adapter_name="second", **options)
    expected = torch.float32 if autocast else dtype
    # With `low_cpu_mem_usage`, PEFT casts the stored weights to the base model's dtype before it casts them up.
    rounded = dtype if low_cpu_mem_usage else expected
    stored = load_file(f"{adapter}/adapter_model.safetensors")
    for name in ("default", "second"):
        weights = router_state(model, name)
        assert {weight.dtype for weight in weights.values()} == {expected}
        assert {weight.device.type for weight in weights.values()} == {"cpu"}
        for key, weight in weights.items():
            assert torch.equal(weight, stored[key.replace(f".{name}.", ".")].to(rounded).to(expected))
    assert logits_of(model).dtype == dtype


def test_training_resumes_from_a_loaded_adapter(llama, tmp_path):
    model = adapted_model(llama)
    start = router_state(model)
    train_step(model, token_ids(seed=0))
    model.save_pretrained(tmp_path)
    train_step(model, token_ids(seed=1))
    assert all(not torch.equal(weight, start[name]) for name, weight in router_state(model).items())

    resumed = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True)
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == set(router_state(resumed))
    assert not resumed.peft_config["default"].inference_mode
    train_step(resumed, token_ids(seed=1))
    for name, weight in router_state(model).items():
        assert torch.equal(router_state(resumed)[name], weight)
