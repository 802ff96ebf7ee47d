"""A model whose layers are bypassed says so, and never computes the base model's output in silence."""

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from tiny_models import VOCABULARY, tiny_encoder_decoder
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

import peft_moice
from peft_moice import MoICEConfig


def adapted(family: str = "llama"):
    base = tiny_encoder_decoder() if family == "t5gemma" else tiny_model(family)
    return get_peft_model(base, MoICEConfig(base_multipliers=[1.0, 4.0], init_weights=False)).eval()


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
def test_an_upgrade_that_bypasses_the_mixture_is_an_error(monkeypatch, form, upgraded, forward, message):
    """In every pass of a layer that is called; of one that is not, on demand."""
    model = form(adapted())
    assert len(peft_moice.check(model)) == 2
    monkeypatch.setattr(upgraded, "forward", forward)
    with pytest.raises(RuntimeError, match=message):
        peft_moice.check(model)
    for _ in range(2 if upgraded is LlamaAttention else 0):
        with pytest.raises(RuntimeError, match=message):
            model(tokens())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5gemma", "qwen3_next"])
def test_models_that_work_pass_and_are_left_as_they_were(family):
    for model in (adapted(family), adapted(family).merge_and_unload()):
        ids = tokens().clamp(max=VOCABULARY - 1)
        model(**({"decoder_input_ids": ids} if family == "t5gemma" else {}), input_ids=ids)
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


def test_a_layer_that_is_left_out_is_found_on_demand():
    """Training drops layers, too, and models exit early."""
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
    torch.compiler.reset()
    model = adapted()
    expected = adapted()
    expected.load_state_dict(model.state_dict())
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    peft_moice.check(model)
