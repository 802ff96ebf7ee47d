"""A model whose layers are bypassed says so, and never computes the base model's output in silence."""

import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from torch.nn import functional
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

import peft_moice
from peft_moice import MoICEConfig
from peft_moice.routing.mixture import MixesAngles


def adapted(family: str = "llama"):
    base = tiny_encoder_decoder() if family == "t5gemma" else tiny_model(family)
    return get_peft_model(base, MoICEConfig(base_multipliers=[1.0, 4.0], init_weights=False)).eval()


def tiny_encoder_decoder() -> T5GemmaForConditionalGeneration:
    shape = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    encoder, decoder = T5GemmaModuleConfig(**shape), T5GemmaModuleConfig(**shape)
    config = T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=128)
    return T5GemmaForConditionalGeneration(config)


def own_attention(self, hidden_states, position_embeddings, *args, **kwargs):
    """Llama's attention without the attention interface."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


original_attention = LlamaAttention.forward


def attention_without_keywords(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """Llama's attention, which does not hand further keywords down."""
    return original_attention(self, hidden_states, position_embeddings, attention_mask)


def layer_without_attention_module(self, hidden_states, position_embeddings=None, **kwargs):
    """A decoder layer that uses its attention module's weights and leaves the module itself out."""
    attention = getattr(self.self_attn, "base_layer", self.self_attn)
    hidden_states = (
        hidden_states + own_attention(attention, self.input_layernorm(hidden_states), position_embeddings)[0]
    )
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def merged(model):
    return model.merge_and_unload()


UPGRADES = [
    (LlamaAttention, own_attention, "did not ask for its mixture"),
    (LlamaAttention, attention_without_keywords, "did not ask for its mixture"),
    (LlamaDecoderLayer, layer_without_attention_module, "did not call the adapted"),
]


@pytest.mark.parametrize("upgraded, forward, message", UPGRADES)
@pytest.mark.parametrize("form", [lambda model: model, merged], ids=["adapter", "merged"])
def test_an_upgrade_that_bypasses_the_mixture_is_an_error_in_the_first_pass(
    monkeypatch, form, upgraded, forward, message
):
    model = form(adapted())
    monkeypatch.setattr(upgraded, "forward", forward)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            model(tokens())
    with pytest.raises(RuntimeError, match=message):
        peft_moice.check(model)


@pytest.mark.parametrize("upgraded, forward, message", UPGRADES)
def test_a_check_on_demand_finds_what_happens_after_the_first_pass(monkeypatch, upgraded, forward, message):
    model = adapted()
    model(tokens())
    peft_moice.check(model)
    monkeypatch.setattr(upgraded, "forward", forward)
    with pytest.raises(RuntimeError, match=message):
        peft_moice.check(model)


def test_the_base_model_needs_no_mixture(monkeypatch):
    model = adapted()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer_without_attention_module)
    with model.disable_adapter():
        model(tokens())
    # Which says nothing about the adapter.
    with pytest.raises(RuntimeError, match="did not call the adapted"):
        model(tokens())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5gemma", "qwen3_next"])
def test_models_that_work_pass_and_are_left_as_they_were(family):
    for model in (adapted(family), adapted(family).merge_and_unload()):
        model(**({"decoder_input_ids": tokens()} if family == "t5gemma" else {}), input_ids=tokens())
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        hooks = hooks_of(model)
        peft_moice.check(model)
        assert model.training
        assert hooks_of(model) == hooks
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def hooks_of(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_the_first_pass_is_watched_and_no_other():
    model = adapted()
    before = hooks_of(model)
    model(tokens())
    after = hooks_of(model)
    assert after == before - 1 - sum(isinstance(module, MixesAngles) for module in model.modules())
    model(tokens())
    assert hooks_of(model) == after


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_too(monkeypatch, copy_of):
    model = copy_of(adapted())
    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer_without_attention_module)
    with pytest.raises(RuntimeError, match="did not call the adapted"):
        model(tokens())


def test_unloading_leaves_no_hooks():
    model = adapted().unload()
    assert hooks_of(model) == 0


def test_a_single_layer_that_is_left_out_is_found_on_demand_only():
    """As by training that drops layers, or exits early."""
    model = adapted()
    model.get_base_model().model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    model(tokens())
    with pytest.raises(
        RuntimeError, match=r"did not call the adapted attention modules \['[a-z_.]*layers.1.self_attn'\]"
    ):
        peft_moice.check(model)


def test_without_a_mixture_there_is_nothing_to_check():
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="nothing to check"):
        peft_moice.check(model)
    with pytest.raises(ValueError, match="nothing to check"):
        peft_moice.check(tiny_model("llama"))


@pytest.mark.slow
def test_compiled_layers_count():
    """Layers compiled one by one in a model that is not: what they note is seen outside."""
    torch.compiler.reset()
    model = adapted()
    expected = adapted()
    expected.load_state_dict(model.state_dict())
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    assert hooks_of(model) == hooks_of(expected)
    peft_moice.check(model)


def test_checkpointing_runs_layers_again():
    model = adapted().train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
