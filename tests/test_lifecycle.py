"""Saving, loading, switching, disabling and removing adapters, with the calls of PEFT and of transformers."""

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    WIDE,
    decide,
    layers_of,
    load,
    logits_of,
    router_state,
    save_tiny_model,
    token_ids,
    wide_config,
)
from transformers import AutoModelForCausalLM, LlamaConfig, pipeline
from versions import NEEDS_PEFT_FOR_TRANSFORMERS, needs_transformers

from peft_moice import MoICEConfig, MoICELayer, MoICEModel
from peft_moice.mixture import LayerMixture
from peft_moice.router import select_experts


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of one tiny model per family."""
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def llama(bases):
    return bases["llama"]


@pytest.fixture
def adapted(llama):
    """A tiny llama with one adapter that decides firmly."""
    model = get_peft_model(load(llama), wide_config()).eval()
    decide(model)
    return model


@pytest.fixture
def adapter(adapted, tmp_path):
    """The folder of that adapter."""
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def two_adapters(folder, **second):
    """A tiny model with the adapters "one" and "two" (active: "one"), whose routers differ."""
    model = get_peft_model(load(folder), wide_config(), adapter_name="one").eval()
    model.add_adapter("two", wide_config(**second))
    decide(model, "one", seed=1)
    decide(model, "two", seed=2)
    return model


# --- saving and loading ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overrides", [{}, {"router_scope": "head", "init_weights": "identity", "router_dim": 3}])
def test_a_saved_adapter_loads_into_an_equal_model(bases, tmp_path, family, overrides):
    model = get_peft_model(load(bases[family]), wide_config(**overrides)).eval()
    decide(model)
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


def test_an_adapter_of_a_7b_model_is_under_300_kilobytes(tmp_path):
    # Llama-2-7B has 32 layers and D = 128; the other sizes do not reach a shared router.
    base = save_tiny_model(tmp_path / "base", num_hidden_layers=32, head_dim=128)
    model = get_peft_model(load(base), MoICEConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    assert sum(weight.numel() for weight in weights.values()) == 32 * (2 * 7 * 128 + 7 * 7)
    assert file.stat().st_size < 300_000


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
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load(llama), tmp_path / "two", adapter_name="b")
    loaded.load_adapter(tmp_path / "one", adapter_name="a")
    assert torch.equal(logits_of(loaded), expected["two"])
    loaded.set_adapter("a")
    assert torch.equal(logits_of(loaded), expected["one"])


def test_saving_one_of_several_adapters_leaves_the_others_out(llama, tmp_path):
    two_adapters(llama).save_pretrained(tmp_path, selected_adapters=["two"])
    assert not (tmp_path / "one").exists()
    assert len(load_file(tmp_path / "two" / "adapter_model.safetensors")) == 9


def test_adapter_names_that_look_like_parts_of_keys(llama, tmp_path):
    for name in ("gate_proj", "model", "0", "moice", "self_attn"):
        model = get_peft_model(load(llama), wide_config(), adapter_name=name).eval()
        decide(model, name)
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "saved" / name, adapter_name=name)
        assert torch.equal(logits_of(loaded), logits_of(model)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_get_peft_model_keeps_routers_of_a_bfloat16_model_in_float32(llama):
    model = get_peft_model(load(llama, dtype=torch.bfloat16), wide_config())
    assert {weight.dtype for weight in router_state(model).values()} == {torch.float32}
    model = get_peft_model(load(llama, dtype=torch.bfloat16), wide_config(), autocast_adapter_dtype=False)
    assert {weight.dtype for weight in router_state(model).values()} == {torch.bfloat16}


# --- without PeftModel ---


def test_inject_adapter_in_model(llama, adapted, adapter):
    model = inject_adapter_in_model(PeftConfig.from_pretrained(adapter), load(llama))
    result = set_peft_model_state_dict(model, load_file(f"{adapter}/adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert torch.equal(logits_of(model), logits_of(adapted))
    gc.collect()  # the tuner object itself is gone by now
    assert torch.equal(logits_of(model), logits_of(adapted))
    saved = get_peft_model_state_dict(model)
    assert set(saved) == {
        key.removeprefix("base_model.model.") for key in load_file(f"{adapter}/adapter_model.safetensors")
    }


def test_inject_adapter_in_model_on_the_meta_device(llama, adapted, adapter):
    model = inject_adapter_in_model(PeftConfig.from_pretrained(adapter), load(llama), low_cpu_mem_usage=True)
    assert {weight.device.type for weight in router_state(model).values()} == {"meta"}
    state = load_file(f"{adapter}/adapter_model.safetensors")
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(model), logits_of(adapted))


@NEEDS_PEFT_FOR_TRANSFORMERS
def test_verbs_of_transformers(llama, adapter, adapted, tmp_path):
    model = load(llama)
    base = logits_of(model)
    model.load_adapter(adapter, adapter_name="loaded")
    assert torch.equal(logits_of(model), logits_of(adapted))

    model.add_adapter(wide_config(), adapter_name="fresh")
    assert model.active_adapters() == ["fresh"]
    decide(model, "fresh", seed=9)
    fresh = logits_of(model)
    assert not torch.equal(fresh, logits_of(adapted))
    model.set_adapter("loaded")
    assert torch.equal(logits_of(model), logits_of(adapted))
    model.disable_adapters()
    assert torch.equal(logits_of(model), base)
    model.enable_adapters()
    assert torch.equal(logits_of(model), logits_of(adapted))

    model.set_adapter("fresh")
    model.save_pretrained(tmp_path / "fresh")
    again = load(llama)
    again.load_adapter(str(tmp_path / "fresh"))
    assert torch.equal(logits_of(again), fresh)

    model.delete_adapter("fresh")
    assert list(model.peft_config) == ["loaded"]
    assert torch.equal(logits_of(model), logits_of(adapted))


@NEEDS_PEFT_FOR_TRANSFORMERS
def test_add_adapter_of_transformers_trains_with_the_balance_loss(llama):
    model = load(llama).train()
    model.add_adapter(wide_config())
    outputs = model(token_ids(), labels=token_ids())
    assert outputs.aux_loss > 0
    outputs.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(router_state(model))


def test_pipeline_from_the_folder_of_an_adapter(adapter, adapted):
    generator = pipeline("text-generation", model=adapter)
    assert layers_of(generator.model)
    text = generator("w5 w9 w11 w2 w7", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = torch.tensor([[5, 9, 11, 2, 7]])
    tokens = adapted.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    assert text.split() == generator.tokenizer.convert_ids_to_tokens(tokens)


# --- several adapters ---


def test_set_and_delete_adapter(llama):
    model = two_adapters(llama)
    one = logits_of(model)
    model.set_adapter("two")
    two = logits_of(model)
    assert not torch.allclose(one, two, atol=1e-4)
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert torch.equal(logits_of(model), one)
    for layer in layers_of(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert set(getattr(layer, attribute)) == {"one"}
    model.add_adapter("two", wide_config(top_k=4))
    model.set_adapter("two")
    decide(model, "two", seed=2)
    assert not torch.equal(logits_of(model), two)  # another top_k


def test_deleting_the_last_adapter_leaves_the_base_model(llama, adapted):
    adapted.delete_adapter("default")
    # PeftModel's own forward looks the active adapter's config up, so it cannot run without one.
    assert torch.equal(logits_of(adapted.base_model.model), logits_of(load(llama)))


def test_only_active_adapters_are_trained(llama):
    model = two_adapters(llama)
    assert all(p.requires_grad == (".one." in name) for name, p in model.named_parameters())
    model.set_adapter("two")
    assert all(p.requires_grad == (".two." in name) for name, p in model.named_parameters())
    model.base_model.set_adapter(["one", "two"])
    assert all(p.requires_grad == ("moice_router" in name) for name, p in model.named_parameters())
    model.set_adapter("one", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def capture_attention(layer, model, input_ids):
    """The arguments of `layer`'s one call in a pass of `model`, and the attention's output before `o_proj`."""
    calls, outputs = [], []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
        layer.base_layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0])),
    ]
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls[0], outputs[0]


def attention_of(layer, call):
    outputs = []
    handle = layer.base_layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        layer(*call[0], **call[1])
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("second", [{}, {"base_multipliers": [1.0, 0.25, 8.0], "top_k": 1}, {"router_scope": "head"}])
def test_active_adapters_average_their_attention(llama, second):
    model = two_adapters(llama, **second)
    layer = layers_of(model)[1]
    model.base_model.set_adapter(["one", "two"])
    call, both = capture_attention(layer, model, token_ids())
    singles = []
    for name in ("one", "two"):
        layer.set_adapter(name)
        singles.append(attention_of(layer, call))
    assert not torch.allclose(*singles, atol=1e-3)
    torch.testing.assert_close(both, (singles[0] + singles[1]) / 2, rtol=1e-5, atol=1e-6)


def test_gates_of_active_adapters_are_the_mean_of_gates_on_the_union(llama):
    model = two_adapters(llama, base_multipliers=[1.0, 0.25, 8.0], top_k=2)
    layer = layers_of(model)[0]
    model.base_model.set_adapter(["one", "two"])
    mixture = LayerMixture(layer.members(), layer.rope)
    own = layer.rope.rope_theta
    # The angles 1 and 0.25 occur in both adapters, and are computed once.
    assert mixture.rope_bases() == tuple(own * multiple for multiple in (1.0, 0.25, 0.5, 4.0, 8.0))
    query = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(3))
    one, two = (layer.moice_router[name](query) for name in ("one", "two"))
    expected = torch.zeros(2, 4, 5, 5)
    expected[..., [0, 1, 2, 3]] += select_experts(one, 2) / 2
    expected[..., [0, 1, 4]] += select_experts(two, 2) / 2
    torch.testing.assert_close(mixture.gates(query, mixture.rope_bases()), expected)


def test_one_adapter_twice_is_that_adapter(llama):
    model = two_adapters(llama)
    for layer in layers_of(model):
        layer.moice_router["two"].load_state_dict(layer.moice_router["one"].state_dict())
    one = logits_of(model)
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits_of(model), one, rtol=1e-5, atol=1e-6)


# --- disabling and removing ---


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_adapter_is_bitwise_the_base_model(bases, family):
    base = load(bases[family])
    model = get_peft_model(load(bases[family]), wide_config()).eval()
    decide(model)
    adapted = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base))
        ids = token_ids()
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(input_ids=ids, **options), base.generate(input_ids=ids, **options))
    assert torch.equal(logits_of(model), adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_adapter_in_the_middle_of_a_generation(bases, family):
    base = load(bases[family])
    model = get_peft_model(load(bases[family]), wide_config(layers_to_transform=[2])).eval()
    decide(model)
    ids, rest = token_ids().split([8, 6], dim=1)
    with torch.no_grad():
        own = model(ids, use_cache=True)
        reference = base(ids, use_cache=True)
        # Layer 2 is the last: its keys come from the hidden states below it, untouched by the adapter.
        for adapted_layer, base_layer in zip(
            own.past_key_values.layers, reference.past_key_values.layers, strict=True
        ):
            assert torch.equal(adapted_layer.keys, base_layer.keys)
            assert torch.equal(adapted_layer.values, base_layer.values)
        assert not torch.equal(own.logits, reference.logits)
        with model.disable_adapter():
            continued = model(rest[:, :3], past_key_values=own.past_key_values)
        expected = base(rest[:, :3], past_key_values=reference.past_key_values)
        assert torch.equal(continued.logits, expected.logits)
        resumed = model(rest[:, 3:], past_key_values=own.past_key_values)
    full = logits_of(model, token_ids())[:, 11:]
    torch.testing.assert_close(resumed.logits, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remove", ["unload", "delete_and_unload"])
def test_unload_gives_the_original_objects_back(llama, remove):
    model = load(llama)
    expected = logits_of(model)
    modules = dict(model.named_modules())
    configs = {name: module.config for name, module in modules.items() if hasattr(module, "config")}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    adapted = get_peft_model(model, wide_config())
    adapted.add_adapter("second", wide_config())
    adapted(token_ids(), labels=token_ids())
    if remove == "delete_and_unload":
        adapted.delete_adapter("default")
        adapted.delete_adapter("second")
    layers = [weakref.ref(layer) for layer in layers_of(adapted)]

    unloaded = adapted.unload()
    assert unloaded is model
    after = dict(unloaded.named_modules())
    assert after.keys() == modules.keys()
    for name, module in after.items():
        assert module is modules[name]
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[name]
        assert set(vars(module)) == attributes[name], name
        if name in configs:
            assert module.config is configs[name]
    assert torch.equal(logits_of(unloaded.eval()), expected)
    del adapted
    gc.collect()
    assert not any(layer() for layer in layers)


def test_an_unloaded_model_can_be_adapted_again(llama, adapted):
    expected = logits_of(adapted)
    again = get_peft_model(adapted.unload(), wide_config()).eval()
    decide(again)
    assert torch.equal(logits_of(again), expected)


def test_statuses(llama):
    model = two_adapters(llama)
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "MoICEModel"
    assert status.peft_types == {"one": "MOICE", "two": "MOICE"}
    assert status.num_adapter_layers == 3
    assert status.trainable_params == sum(weight.numel() for weight in router_state(model, "one").values())
    assert status.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert (status.active_adapters, status.available_adapters) == (["one"], ["one", "two"])
    assert (status.enabled, status.merged_adapters) == (True, [])
    assert status.requires_grad == {"one": True, "two": False}
    assert status.devices == {"one": ["cpu"], "two": ["cpu"]}
    layer_status = model.get_layer_status()
    assert [layer.name for layer in layer_status] == [f"model.model.layers.{index}.self_attn" for index in range(3)]
    assert {layer.module_type for layer in layer_status} == {"moice.MoICELayer"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# --- copies and moves ---


def test_deepcopy_is_equal_and_independent(adapted):
    twin = copy.deepcopy(adapted)
    expected = logits_of(adapted)
    assert torch.equal(logits_of(twin), expected)
    decide(twin, seed=5)
    assert not torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(adapted), expected)
    twin.set_adapter("default")
    twin.train()
    assert twin(token_ids(), labels=token_ids()).aux_loss > 0


def test_a_copy_follows_its_own_attention_implementation(adapted):
    twin = copy.deepcopy(adapted)
    twin.base_model.model.set_attn_implementation("eager")
    assert layers_of(twin)[0].config is not layers_of(adapted)[0].config
    with torch.no_grad():
        assert twin(token_ids(), output_attentions=True).attentions is not None
        assert adapted(token_ids()).logits is not None
    assert adapted.config._attn_implementation == "sdpa"


def test_pickle(adapted):
    twin = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(logits_of(twin), logits_of(adapted))
    twin.train()
    assert twin(token_ids(), labels=token_ids()).aux_loss > 0


def test_torch_save_of_the_whole_model(adapted, tmp_path):
    torch.save(adapted, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(twin), logits_of(adapted))
    assert torch.equal(logits_of(twin.unload()), logits_of(adapted.unload()))


def test_a_state_dict_restores_the_model(llama, adapted, tmp_path):
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    other = get_peft_model(load(llama), wide_config()).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits_of(other), logits_of(adapted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(adapted, dtype):
    expected = logits_of(adapted)
    adapted.to(dtype)
    assert {weight.dtype for weight in router_state(adapted).values()} == {dtype}
    moved = logits_of(adapted)
    assert moved.dtype == dtype
    # Rounding may turn a close choice among the top K, so the bulk is compared.
    tolerance = 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (moved.float() - expected).abs().median() < tolerance * expected.abs().max()


def test_mixed_precision_routers_in_a_bfloat16_model(llama):
    model = get_peft_model(load(llama, dtype=torch.bfloat16), wide_config())
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in gradients)


# --- training on from what was saved ---


def train_step(model, optimizer, seed=0):
    optimizer.zero_grad()
    ids = token_ids(seed=seed)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_training_resumes_from_a_loaded_adapter(llama, tmp_path):
    def trainer_of(model):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(parameters, lr=0.5)

    model = get_peft_model(load(llama), wide_config()).train()
    decide(model)
    start = router_state(model)
    train_step(model, trainer_of(model))
    model.save_pretrained(tmp_path)
    train_step(model, trainer_of(model), seed=1)
    assert all(not torch.equal(weight, start[name]) for name, weight in router_state(model).items())

    resumed = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True).train()
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == set(router_state(resumed))
    assert not resumed.peft_config["default"].inference_mode
    train_step(resumed, trainer_of(resumed), seed=1)
    for name, weight in router_state(model).items():
        assert torch.equal(router_state(resumed)[name], weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradient_checkpointing_changes_nothing(bases, family, use_reentrant):
    # The balance loss under reentrant checkpointing is not this test's subject.
    coefficient = 0.0 if use_reentrant else 0.3
    model = get_peft_model(load(bases[family]), wide_config(router_aux_loss_coef=coefficient)).train()
    decide(model)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(token_ids(), labels=token_ids(), use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected_loss, expected = loss_and_gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    loss, gradients = loss_and_gradients()
    assert torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@needs_transformers("5.18", "loses `modules_to_save` in its own loader of adapters")
def test_modules_to_save(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(modules_to_save=["lm_head"])).eval()
    decide(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    train_step(model, optimizer)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in keys and len(keys) == 10
    for loaded in (
        PeftModel.from_pretrained(load(llama), tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        PeftModel.from_pretrained(load(llama), tmp_path, low_cpu_mem_usage=True),
    ):
        assert torch.equal(logits_of(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(llama)))


@needs_transformers("5.18", "loses `trainable_token_indices` in its own loader of adapters")
def test_trainable_token_indices(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(trainable_token_indices=[3, 5])).eval()
    decide(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = token_ids()
    ids[:, :2] = torch.tensor([3, 5])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    expected = logits_of(model, ids)
    embeddings = model.get_input_embeddings()
    before = load(llama).get_input_embeddings()
    with torch.no_grad():
        changed = (embeddings(torch.arange(64)) != before(torch.arange(64))).any(dim=-1)
    assert changed.nonzero().flatten().tolist() == [3, 5]
    model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(load(llama), tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits_of(loaded, ids), expected)


def test_merging_beside_trained_tokens(llama):
    model = get_peft_model(load(llama), wide_config(trainable_token_indices=[3, 5])).eval()
    decide(model)
    model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].data.normal_()
    ids = token_ids()
    ids[:, :2] = torch.tensor([3, 5])
    expected = logits_of(model, ids)
    assert not torch.allclose(expected, logits_of(load(llama), ids), atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=1e-5, atol=1e-6)


def test_part_of_the_layers(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(layers_to_transform=[0, 2])).eval()
    decide(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, MoICELayer)]
    assert [name.split(".")[4] for name in adapted] == ["0", "2"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_a_second_adapter_on_other_layers(llama):
    model = get_peft_model(load(llama), wide_config(layers_to_transform=[0]), adapter_name="low").eval()
    low = logits_of(model)
    model.add_adapter("high", wide_config(layers_to_transform=[1, 2]))
    decide(model, "high")
    assert torch.equal(logits_of(model), low)
    model.set_adapter("high")
    alone = get_peft_model(load(llama), wide_config(layers_to_transform=[1, 2])).eval()
    decide(alone)
    assert torch.equal(logits_of(model), logits_of(alone))
    assert isinstance(model.base_model, MoICEModel)
