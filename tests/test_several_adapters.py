"""Several adapters in one model: switched, active together, deleted, on other layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import (
    WIDE,
    adapted_model,
    decide,
    layers_of,
    load,
    logits_of,
    logits_with,
    tiny_encoder_decoder,
    token_ids,
    two_adapters,
    wide_config,
)

from peft_moice import MoICEConfig, MoICEModel
from peft_moice.routing.mixture import LayerMixture
from peft_moice.routing.router import select_experts


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


@pytest.mark.parametrize("second", [{}, {"base_multipliers": [1.0, 0.25, 8.0], "top_k": 1}, {"router_scope": "head"}])
def test_active_adapters_average_their_attention(llama, second):
    """Seen in the first layer, which gets the same under either, and whose output is linear in its attention's."""
    model, outputs = two_adapters(llama, **second), []
    layers_of(model)[0].register_forward_hook(lambda layer, args, output: outputs.append(output[0]))
    for active in (["one"], ["two"], ["one", "two"]):
        logits_with(model, *active)
    one, two, both = outputs
    assert not torch.allclose(one, two, atol=1e-3)
    torch.testing.assert_close(both, (one + two) / 2, rtol=1e-5, atol=1e-6)


def test_gates_of_active_adapters_are_the_mean_of_gates_on_the_union(llama):
    model = two_adapters(llama, base_multipliers=[1.0, 0.25, 8.0], top_k=2)
    layer = layers_of(model)[0]
    model.base_model.set_adapter(["one", "two"])
    mixture = LayerMixture(layer.shares(), layer.rope)
    own = layer.rope.rope_theta
    # The angles 1 and 0.25 occur in both adapters, and are computed once.
    assert mixture.rope_bases() == tuple(own * multiple for multiple in (0.25, 0.5, 1.0, 4.0, 8.0))
    query = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(3))
    one, two = (layer.moice_router[name](query) for name in ("one", "two"))
    expected = torch.zeros(2, 4, 5, 5)
    expected[..., [2, 0, 1, 3]] += select_experts(one, 2) / 2
    expected[..., [2, 0, 4]] += select_experts(two, 2) / 2
    torch.testing.assert_close(mixture.gate(query, mixture.rope_bases()).gates, expected)


def test_a_second_adapter_on_other_layers(llama):
    model = get_peft_model(load(llama), wide_config(layers_to_transform=[0]), adapter_name="low").eval()
    low = logits_of(model)
    model.add_adapter("high", wide_config(layers_to_transform=[1, 2]))
    decide(model, "high")
    assert torch.equal(logits_of(model), low)
    model.set_adapter("high")
    alone = adapted_model(llama, layers_to_transform=[1, 2])
    assert torch.equal(logits_of(model), logits_of(alone))
    assert isinstance(model.base_model, MoICEModel)


def test_a_second_adapter_beside_another_rotary_embedding():
    """An encoder-decoder has a rotary embedding on either side; both are watched."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base, options = tiny_encoder_decoder(max_position_embeddings=16, rope_parameters=rope), {"base_multipliers": WIDE}
    model = get_peft_model(base, MoICEConfig(target_modules=r".*decoder.*self_attn", **options), adapter_name="one")
    model.add_adapter("two", MoICEConfig(target_modules=r".*encoder.*self_attn", **options))
    model.set_adapter("two")
    model(input_ids=token_ids(length=14), decoder_input_ids=token_ids(length=4))
    with pytest.raises(ValueError, match="'dynamic' have grown"):
        model(input_ids=token_ids(length=30), decoder_input_ids=token_ids(length=4))


@pytest.mark.slow
def test_new_routers_do_not_replace_trained_ones(llama, adapter):
    base = load(llama)
    model = PeftModel.from_pretrained(base, adapter).eval()
    expected = logits_of(model)
    for inject in (get_peft_model, lambda *args: inject_adapter_in_model(*args[::-1])):
        with pytest.raises(ValueError, match=r"add_adapter.*unload.*PeftModel.from_pretrained"):
            inject(base, wide_config())
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, adapter).eval()), expected)
    model.unload()
    get_peft_model(base, wide_config())
