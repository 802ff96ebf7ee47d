"""Adapters that train more than their routers: whole modules and the embeddings of single tokens."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import decide, layers_of, load, logits_of, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM
from versions import needs_transformers

from peft_moice import MoICELayer


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    """A model whose attention modules have norms of their own."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    model.eval()


def test_modules_inside_of_attention(qwen3, tmp_path):
    base = load(qwen3)
    model = get_peft_model(base, wide_config(modules_to_save=["embed_tokens", "norm"]))
    decide(model)
    train(model)
    norm = layers_of(model)[0].k_norm
    assert (norm.modules_to_save["default"].weight - norm.original_module.weight).abs().max() > 0
    expected = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load(qwen3)))
    model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(load(qwen3), tmp_path),
        PeftModel.from_pretrained(load(qwen3), tmp_path, low_cpu_mem_usage=True),
    ):
        assert torch.equal(logits_of(loaded), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-6)
    assert not any("original_module" in name for name, _ in merged.named_parameters())


@needs_transformers("5.18", "loses `modules_to_save` in its own loader of adapters")
def test_transformers_loads_modules_inside_of_attention(qwen3, tmp_path):
    model = get_peft_model(load(qwen3), wide_config(modules_to_save=["norm"]))
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_modules_inside_of_attention_come_back_when_unloading(qwen3):
    base = load(qwen3)
    names = [name for name, _ in base.named_modules()]
    model = get_peft_model(base, wide_config(modules_to_save=["norm"]))
    train(model)
    assert [name for name, _ in model.unload().named_modules()] == names
    assert not any(isinstance(module, MoICELayer) for module in base.modules())


def test_a_second_adapter_that_reaches_into_attention(qwen3):
    model = get_peft_model(load(qwen3), wide_config(), adapter_name="one").eval()
    decide(model, "one")
    one = logits_of(model)
    model.add_adapter("two", wide_config(modules_to_save=["k_norm"]))
    assert torch.equal(logits_of(model), one)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".moice_router.one." in name}
    decide(model, "two", seed=1)
    model.set_adapter("two")
    train(model)
    two = logits_of(model)
    model.set_adapter("one")
    assert torch.equal(logits_of(model), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits_of(model), two)
    assert all(isinstance(layer.self_attn, MoICELayer) for layer in model.base_model.model.model.layers)
