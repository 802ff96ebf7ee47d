"""Adapters that train more than routers: whole modules, also inside of attention, and embeddings of single tokens."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    adapted_model,
    assert_logits,
    decide,
    layers_of,
    load,
    logits_of,
    token_ids,
    train_step,
    wide_config,
)
from transformers import AutoModelForCausalLM
from versions import needs_transformers

from peft_moice import MoICEConfig

NAMES = ["embed_tokens", "norm", "lm_head"]


@pytest.fixture
def qwen3(bases) -> str:
    """A model whose attention modules have norms of their own."""
    return bases["qwen3"]


def adapted(qwen3: str, **options) -> PeftModel:
    return adapted_model(qwen3, modules_to_save=NAMES, **options)


def saved_parameters(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.nn.Parameter]:
    marker = f".modules_to_save.{adapter_name}."
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if marker in n}


def change(model: PeftModel, adapter_name: str = "default") -> None:
    for parameter in saved_parameters(model, adapter_name).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def test_the_same_modules_are_trained_as_with_lora(qwen3):
    lora = get_peft_model(load(qwen3), LoraConfig(target_modules=["q_proj"], modules_to_save=NAMES))
    model = adapted(qwen3)
    expected = {name for name in saved_parameters(lora) if "lora" not in name}
    assert set(saved_parameters(model)) == expected
    assert any("self_attn.q_norm" in name for name in expected)
    trained = {name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad}
    assert trained == expected | {n for n, _ in model.named_parameters() if "moice_router" in n}
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    gradients = [p.grad for name, p in saved_parameters(model).items() if "embed" not in name]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@needs_transformers("5.18", "loses `modules_to_save` in its own loader of adapters")
def test_they_are_saved_and_reloaded(qwen3, tmp_path):
    model = adapted(qwen3)
    before = logits_of(model)
    train_step(model, token_ids())
    expected = logits_of(model)
    assert (expected - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in keys and sum("q_norm" in key for key in keys) == 3
    for loaded in (
        PeftModel.from_pretrained(load(qwen3), tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        PeftModel.from_pretrained(load(qwen3), tmp_path, low_cpu_mem_usage=True),
    ):
        assert torch.equal(logits_of(loaded.eval()), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(load(qwen3), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for parameter in saved_parameters(trainable).values())


def test_a_second_adapter_has_its_own(qwen3):
    model = adapted(qwen3)
    change(model)
    first = logits_of(model)
    model.add_adapter("second", wide_config(modules_to_save=NAMES))
    decide(model, "second")
    assert saved_parameters(model).keys() == {
        name.replace(".second.", ".default.") for name in saved_parameters(model, "second")
    }
    assert torch.equal(logits_of(model), first)
    assert all(parameter.requires_grad for parameter in saved_parameters(model).values())
    model.set_adapter("second")
    assert torch.equal(logits_of(model), logits_of(adapted(qwen3)))
    assert all(parameter.requires_grad for parameter in saved_parameters(model, "second").values())
    assert not any(parameter.requires_grad for parameter in saved_parameters(model).values())


def test_only_the_second_adapter_has_some(qwen3):
    model = adapted_model(qwen3)
    expected = logits_of(model)
    model.add_adapter("second", wide_config(modules_to_save=NAMES))
    assert torch.equal(logits_of(model), expected)
    decide(model, "second")
    change(model, "second")
    model.set_adapter("second")
    changed = adapted(qwen3)
    change(changed)
    assert torch.equal(logits_of(model), logits_of(changed))


def test_disabled_merged_and_unloaded(qwen3):
    base = logits_of(load(qwen3))
    model = adapted(qwen3)
    change(model)
    expected = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
    merged = adapted(qwen3)
    change(merged)
    assert_logits(merged.merge_and_unload(), expected, atol=1e-5)
    # PEFT leaves what was trained in their place, as over LoRA.
    unloaded = model.unload()
    assert not layers_of(unloaded) and not any("modules_to_save" in name for name, _ in unloaded.named_modules())


@pytest.mark.parametrize("name", ["attn", "_attn"])
def test_names_that_mean_what_is_adapted_are_refused_before_anything_is_replaced(qwen3, name):
    model = load(qwen3)
    with pytest.raises(ValueError, match=rf"`modules_to_save` holds '{name}'.*exclude_modules"):
        get_peft_model(model, wide_config(modules_to_save=[name]))
    assert not layers_of(model)
    assert torch.equal(logits_of(model), logits_of(load(qwen3)))


@needs_transformers("5.18", "loses `trainable_token_indices` in its own loader of adapters")
def test_trainable_token_indices(llama, tmp_path):
    model = adapted_model(llama, trainable_token_indices=[3, 5])
    ids = token_ids()
    ids[:, :2] = torch.tensor([3, 5])
    train_step(model, ids)
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
    torch.testing.assert_close(logits_of(model.merge_and_unload(), ids), expected, rtol=1e-5, atol=1e-6)


def test_a_config_that_was_read_may_train_more_than_before(adapter, llama, tmp_path):
    config = MoICEConfig.from_pretrained(adapter)
    config.modules_to_save, config.inference_mode = ["lm_head"], False
    model = get_peft_model(load(llama), config)
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad
    model.save_pretrained(tmp_path)
    assert_logits(PeftModel.from_pretrained(load(llama), tmp_path).eval(), logits_of(model.eval()))


def test_names_of_no_module_are_told(llama, caplog):
    with caplog.at_level("WARNING", logger="peft_moice"):
        get_peft_model(load(llama), wide_config(modules_to_save=["lm_haed", "score"]))
    assert "lm_haed" in caplog.text
    assert "score" not in caplog.text
