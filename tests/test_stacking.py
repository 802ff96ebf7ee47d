"""MoICE over LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import assert_logits, decide, load, logits_of, token_ids, wide_config

from peft_moice import unwrapped

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def lora_config() -> LoraConfig:
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")


def stacked(llama: str) -> tuple[PeftModel, PeftModel]:
    """MoICE over LoRA on one base model, both adapters called "default"."""
    lora = get_peft_model(load(llama), lora_config())
    model = get_peft_model(lora, wide_config())
    decide(model)
    return lora, model.eval()


def test_both_take_effect(llama):
    lora, model = stacked(llama)
    both = logits_of(model)
    with model.disable_adapter():
        only_lora = logits_of(model)
    with unwrapped(model):
        assert torch.equal(logits_of(lora), only_lora)
        with lora.disable_adapter():
            assert torch.equal(logits_of(lora), logits_of(load(llama)))
    assert not torch.allclose(both, only_lora, atol=1e-3)
    assert torch.equal(logits_of(model), both)
    assert torch.equal(logits_of(model.unload()), only_lora)


def test_both_are_trained(llama):
    _, model = stacked(llama)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    adapters = {name for name, _ in model.named_parameters() if "moice_router" in name or "lora_" in name}
    assert trained == adapters


def test_checkpoints_hold_nothing_of_each_other_and_fit_the_base_model(llama, tmp_path):
    lora, model = stacked(llama)
    expected = logits_of(model)
    with pytest.warns(UserWarning, match="layers of another tuner .* are not. Save them with"):
        model.save_pretrained(tmp_path / "moice")
    with unwrapped(model):
        only_lora = logits_of(lora)
        lora.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits_of(model), expected), "the layers did not come back"
    assert all("moice_router" in key for key in load_file(tmp_path / "moice" / "adapter_model.safetensors"))
    assert all("lora_" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))

    alone = PeftModel.from_pretrained(load(llama), tmp_path / "lora")
    assert_logits(alone, only_lora)
    both = PeftModel.from_pretrained(alone, tmp_path / "moice")
    assert_logits(both, expected)


def test_merging_over_lora_says_the_order_that_works(llama, tmp_path):
    lora, model = stacked(llama)
    expected = logits_of(model)
    with pytest.raises(ValueError, match="Unload MoICE with `unload\\(\\)`, merge the other adapter first"):
        model.merge_and_unload()
    with pytest.warns(UserWarning, match="another tuner"):
        model.save_pretrained(tmp_path)
    only_lora = logits_of(model.unload())
    base = lora.merge_and_unload()
    assert_logits(base, only_lora, atol=1e-5)
    both = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    assert_logits(both, expected, atol=1e-5)


def test_lora_after_moice_raises_and_works_while_unwrapped(llama):
    model = get_peft_model(load(llama), wide_config())
    decide(model)
    alone = logits_of(model.eval())
    attention_only = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model.get_base_model(), attention_only)
    with unwrapped(model):
        lora = get_peft_model(model.get_base_model(), attention_only)
    assert not torch.allclose(logits_of(model), alone, atol=1e-3)
    with unwrapped(model):
        keys = get_peft_model_state_dict(lora)
    assert keys
    assert not any("base_layer" in key or "moice" in key for key in keys)


def test_prompt_tuning_is_refused(llama):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="cannot be put over PROMPT_TUNING"):
        get_peft_model(get_peft_model(load(llama), config), wide_config())


def test_moice_over_moice_is_refused(llama):
    with pytest.raises(ValueError, match=r"Add another with `model\.add_adapter"):
        get_peft_model(get_peft_model(load(llama), wide_config()), wide_config())


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_over_moice(llama, config_class):
    """Virtual tokens, or the keys of prefix tuning, count as tokens in front.

    Over a `PeftModel`, of LoRA as of MoICE, PEFT itself generates without them.
    """

    def over(implementation: str) -> tuple[PeftModel, PeftModel]:
        torch.manual_seed(0)
        moice = get_peft_model(load(llama), wide_config(implementation=implementation))
        decide(moice)
        model = get_peft_model(moice.get_base_model(), config_class(task_type="CAUSAL_LM", num_virtual_tokens=3))
        for parameter in model.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        return moice, model.eval()

    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    (moice, model), (_, reference) = over("auto"), over("reference")
    model.train()(**inputs, labels=token_ids()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.prompt_encoder.parameters())
    model.eval()
    with torch.no_grad():
        logits, expected = model(**inputs).logits, reference(**inputs).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        with moice.disable_adapter():
            assert (model(**inputs).logits - logits).abs().max() > 1e-3
        options = {**inputs, "do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(model.generate(**options), reference.generate(**options))
