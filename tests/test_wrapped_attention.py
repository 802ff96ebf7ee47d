"""A wrapped attention module from outside: what is read from it and assigned to it, its config, its hooks."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from tiny_models import assert_logits, decide, layers_of, load, logits_of, router_state, token_ids, wide_config


def test_a_projection_can_be_exchanged(adapted, llama):
    base = load(llama)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(base))
        for ours, theirs in zip(layers_of(adapted), base.model.layers, strict=True):
            ours.q_proj = theirs.self_attn.q_proj = torch.nn.Linear(32, 64, bias=False)
        assert torch.equal(logits_of(adapted), logits_of(base))
    assert not any("q_proj" in name for layer in layers_of(adapted) for name in layer._modules)


def test_causality_can_be_lifted(adapted):
    later = token_ids()
    later[:, -1] = (later[:, -1] + 1) % 60 + 2
    assert torch.equal(logits_of(adapted)[:, 0], logits_of(adapted, later)[:, 0])
    for layer in layers_of(adapted):
        layer.is_causal = False
    assert (logits_of(adapted)[:, 0] - logits_of(adapted, later)[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("merged", [False, True])
def test_layers_can_be_dropped_and_counted_anew(adapted, merged):
    model = adapted.merge_and_unload() if merged else adapted
    decoder = model.model if merged else model.base_model.model.model
    decoder.layers = torch.nn.ModuleList(list(decoder.layers)[1:])
    decoder.config.num_hidden_layers = 2
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    options = {"max_new_tokens": 4, "do_sample": False}
    generated = model.generate(input_ids=token_ids(), **options)
    assert torch.equal(generated, model.generate(input_ids=token_ids(), use_cache=False, **options))


def test_what_the_attention_module_lacks_stays_on_the_wrapper(adapted):
    layer = layers_of(adapted)[0]
    layer.note = 1
    assert "note" in vars(layer) and not hasattr(layer.base_layer, "note")
    layer.scaling = 0.5
    del layer.scaling
    assert not hasattr(layer.base_layer, "scaling")
    layer.base_layer.rope = "the model's own"
    layer.rope = layer.rope
    assert layer.base_layer.rope == "the model's own"


@pytest.mark.parametrize("merged", [False, True])
def test_the_attention_implementation_can_be_assigned_layer_by_layer(adapted, merged):
    expected = logits_of(adapted)
    model = adapted.merge_and_unload() if merged else adapted.base_model.model
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    assert model.config._attn_implementation == "eager"
    assert_logits(model, expected, atol=1e-5)
    assert model(token_ids(), output_attentions=True).attentions[0] is not None


def test_the_config_of_a_wrapped_module_is_that_of_the_model(adapted):
    layer, config = layers_of(adapted)[0], adapted.config
    assert layer.config is config
    config.attention_dropout = 0.25
    assert layer.base_layer.config.attention_dropout == 0.25
    layer.base_layer.config.attention_dropout = 0.5
    assert config.attention_dropout == 0.5
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = layer.base_layer.config.no_such_field


def test_another_config_leaves_the_routers_in_place(adapted):
    expected = logits_of(adapted)
    for layer in layers_of(adapted):
        layer.config = copy.deepcopy(adapted.config)
    assert_logits(adapted, expected, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_a_config_of_their_own(adapted, duplicate):
    layer = layers_of(adapted)[0]
    twin = duplicate(layer)
    twin.config._attn_implementation = "eager"
    assert (layer.config._attn_implementation, twin.config._attn_implementation) == ("sdpa", "eager")
    assert twin.base_layer.config._attn_implementation == "moice"


def adapted_with_offloaded_weights(llama, order, **overrides):
    """`cpu_offload` leaves weights on the meta device except while their module runs."""
    model = load(llama)
    for step in order:
        if step == "offload":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model = get_peft_model(model, wide_config(**overrides)).eval()
            assert {weight.device.type for weight in router_state(model).values()} == {"cpu"}
            decide(model)
    return model


@pytest.mark.parametrize("order", [["offload", "adapt"], ["adapt", "offload"]])
def test_weights_that_accelerate_keeps_on_the_cpu(adapted, llama, order):
    expected = logits_of(adapted)
    model = adapted_with_offloaded_weights(llama, order)
    assert torch.equal(logits_of(model), expected)
    assert_logits(model.merge_and_unload(), expected)


def test_an_identity_scale_is_not_offloaded(llama):
    model = adapted_with_offloaded_weights(llama, ["offload", "adapt"], init_weights="identity")
    assert logits_of(model).isfinite().all()
    model = adapted_with_offloaded_weights(llama, ["adapt", "offload"], init_weights="identity")
    with pytest.raises(ValueError, match="Offload the base model first"):
        logits_of(model)
