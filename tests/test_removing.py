"""Disabling adapters, unloading them, and what a model says of them."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from representatives import slow_but
from tiny_models import (
    FAMILIES,
    adapted_model,
    decide,
    layers_of,
    load,
    logits_of,
    router_state,
    token_ids,
    two_adapters,
    wide_config,
)


@pytest.mark.parametrize("family", slow_but(["llama"], FAMILIES))
def test_disable_adapter_is_bitwise_the_base_model(bases, family):
    base = load(bases[family])
    model = adapted_model(bases[family])
    adapted = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base))
        ids = token_ids()
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(input_ids=ids, **options), base.generate(input_ids=ids, **options))
    assert torch.equal(logits_of(model), adapted)


@pytest.mark.parametrize("remove", slow_but(["delete_and_unload"], ["unload", "delete_and_unload"]))
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
    assert (status.adapter_model_type, status.peft_types) == ("MoICEModel", {"one": "MOICE", "two": "MOICE"})
    assert status.num_adapter_layers == 3
    assert status.trainable_params == sum(weight.numel() for weight in router_state(model, "one").values())
    assert (status.active_adapters, status.available_adapters) == (["one"], ["one", "two"])
    assert (status.enabled, status.merged_adapters) == (True, [])
    assert status.requires_grad == {"one": True, "two": False}
    layer_status = model.get_layer_status()
    assert [layer.name for layer in layer_status] == [f"model.model.layers.{index}.self_attn" for index in range(3)]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
