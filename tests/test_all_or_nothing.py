"""What raises leaves the model, its adapters and their configs as they were."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import (
    adapted_model,
    assert_logits,
    layers_of,
    load,
    logits_of,
    router_state,
    token_ids,
    two_adapters,
    wide_config,
)

from peft_moice import MoICEConfig, MoICELayer, load_official_checkpoint
from peft_moice.tuner.rollback import restored_on_error


def state_of(model: torch.nn.Module) -> dict:
    """Whatever a verb could change: modules and their classes, hooks, attributes, flags, configs and weights."""
    state = {"config": copy.deepcopy(vars(model.config)), "config class": type(model.config)}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        state[name] = (id(module), type(module), {key: id(value) for key, value in attributes.items()})
        state[f"{name} hooks"] = (list(module._forward_pre_hooks.values()), list(module._forward_hooks.values()))
        state[f"{name} config"] = id(getattr(module, "config", None))
    for name, parameter in model.named_parameters():
        state[f"{name} value"] = (parameter.requires_grad, parameter.tolist())
    if isinstance(model, PeftModel):
        state["adapters"] = {name: copy.deepcopy(vars(config)) for name, config in model.peft_config.items()}
        state["layers"] = [
            (layer.active_adapters, list(layer.merged_adapters), layer.disable_adapters, dict(layer.router_specs))
            for layer in layers_of(model)
        ]
    return state


@pytest.mark.parametrize(
    "overrides",
    [
        {"target_modules": ["self_attn", "mlp"]},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"lm_head": [3]}},
        {"trainable_token_indices": {"no_such_module": [3]}},
        {"layers_to_transform": [0, 9]},
        {"base_multipliers": None, "rope_bases": [77.0, 88.0]},
    ],
)
def test_a_refused_adapter(llama, overrides):
    base, config = load(llama), wide_config(**overrides)
    before, config_before = state_of(base), copy.deepcopy(vars(config))
    with pytest.raises(ValueError):
        get_peft_model(base, config)
    assert state_of(base) == before
    config_before["base_model_name_or_path"] = config.base_model_name_or_path  # PEFT fills it in before we are asked
    assert vars(config) == config_before

    model = get_peft_model(base, wide_config())
    before = state_of(model)
    with pytest.raises(ValueError):
        model.add_adapter("second", wide_config(**overrides))
    assert state_of(model) == before


def test_a_refused_official_checkpoint(llama):
    base, config = load(llama), MoICEConfig()
    before, config_before = state_of(base), copy.deepcopy(vars(config))
    checkpoint = {
        f"model.layers.{layer}.self_attn.gate_{part}.weight": torch.ones(shape)
        for layer in range(2)
        for part, shape in ((1, (7, 16)), (2, (7, 7)), (3, (7, 16)))
    }
    with pytest.raises(ValueError, match="do not fit"):
        load_official_checkpoint(base, checkpoint, config)
    assert state_of(base) == before
    config_before["base_model_name_or_path"] = config.base_model_name_or_path
    assert vars(config) == config_before


@pytest.fixture
def broken(llama) -> PeftModel:
    """Adapters "one" and "two"; the last layer's router of "one" holds NaN."""
    model = two_adapters(llama)
    layers_of(model)[2].moice_router["one"].down_proj.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_merge_that_finds_nan_in_the_last_layer(broken, verb, merged_before):
    if merged_before:
        broken.merge_adapter(["two"])
    expected = logits_of(broken) if merged_before else None
    before = state_of(broken)
    with pytest.raises(ValueError, match="The adapter one seems to be broken"):
        getattr(broken, verb)(safe_merge=True, adapter_names=["one"])
    after = state_of(broken)
    nan_weight = "base_model.model.model.layers.2.self_attn.moice_router.one.down_proj value"
    before.pop(nan_weight), after.pop(nan_weight)
    assert after == before
    if merged_before:
        assert torch.equal(logits_of(broken), expected)
    else:
        broken.set_adapter("two")
        expected = logits_of(broken)
        broken.merge_adapter()
        assert_logits(broken, expected)


def test_a_combination_that_fails_in_the_last_layer(llama):
    model = two_adapters(llama)
    layers_of(model)[2].moice_router["two"].up_proj.data = torch.zeros(1, 1)
    before = state_of(model)
    with pytest.raises(RuntimeError):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean")
    assert state_of(model) == before


def test_hooks_registered_before_still_have_handles_that_work(llama):
    base = load(llama)
    handle = base.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(KeyError), restored_on_error(base):
        get_peft_model(base, wide_config())
        assert any(isinstance(module, MoICELayer) for module in base.modules())
        raise KeyError
    assert not any(isinstance(module, MoICELayer) for module in base.modules())
    handle.remove()
    assert not base._forward_pre_hooks
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(logits_of(base), logits_of(load(llama)))
    assert base(token_ids(), labels=token_ids()).loss.requires_grad
    assert not router_state(base)


@pytest.fixture
def misfit(llama, tmp_path) -> str:
    """The folder of an adapter whose weights lack a layer that its config names."""
    model = get_peft_model(load(llama), wide_config())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.2." not in k}, tmp_path / "adapter_model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_refused_file(llama, misfit, low_cpu_mem_usage):
    base = load(llama)
    expected = logits_of(base)
    with pytest.raises(ValueError, match="lacks 3 of 9 router weights"):
        PeftModel.from_pretrained(base, misfit, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not layers_of(base)
    assert torch.equal(logits_of(base), expected)


def test_refused_weights_leave_a_trained_adapter_alone(llama, misfit):
    model = adapted_model(llama)
    before = state_of(model)
    weights = load_file(f"{misfit}/adapter_model.safetensors")
    calls = [lambda: set_peft_model_state_dict(model, weights), lambda: model.load_adapter(misfit, "default")]
    for call in calls * 2:
        with pytest.raises(ValueError, match="lacks 3 of 9 router weights"):
            call()
        assert state_of(model) == before
    with pytest.raises(ValueError, match="lacks 3 of 9 router weights"):
        model.load_adapter(misfit, "second")
    after = state_of(model)
    before.pop("base_model"), after.pop("base_model")  # which names are active is another list, of the same names
    assert after == before and model.active_adapters == ["default"]


def test_a_block_inside_of_another_puts_back_what_only_it_knows(llama):
    base, config = load(llama), wide_config()
    before = copy.deepcopy(vars(config))
    with restored_on_error(base):
        with pytest.raises(ValueError), restored_on_error(base.model, config):
            config.top_k = 3
            raise ValueError
        assert vars(config) == before
    with pytest.raises(ValueError, match="no_such_module"), restored_on_error(base):
        get_peft_model(base, wide_config(trainable_token_indices={"no_such_module": [3]}))
    assert not layers_of(base)
