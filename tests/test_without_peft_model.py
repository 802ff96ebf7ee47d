"""Adapters without a `PeftModel`: injected, or by the verbs of transformers."""

import gc

import pytest
import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import decide, layers_of, load, logits_of, router_state, wide_config
from transformers import pipeline
from versions import needs_adapter_verbs_of_transformers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inject_adapter_in_model(llama, adapted, adapter, device):
    config, state = PeftConfig.from_pretrained(adapter), load_file(f"{adapter}/adapter_model.safetensors")
    options = {"low_cpu_mem_usage": device == "meta"}
    model = inject_adapter_in_model(config, load(llama), **options)
    assert {weight.device.type for weight in router_state(model).values()} == {device}
    assert not set_peft_model_state_dict(model, state, **options).unexpected_keys
    gc.collect()  # the tuner object itself is gone by now
    assert torch.equal(logits_of(model), logits_of(adapted))
    assert set(get_peft_model_state_dict(model)) == {key.removeprefix("base_model.model.") for key in state}


@needs_adapter_verbs_of_transformers
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


@pytest.mark.slow
def test_pipeline_from_the_folder_of_an_adapter(adapter, adapted):
    generator = pipeline("text-generation", model=adapter)
    assert layers_of(generator.model)
    text = generator("w5 w9 w11 w2 w7", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = torch.tensor([[5, 9, 11, 2, 7]])
    tokens = adapted.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    assert text.split() == generator.tokenizer.convert_ids_to_tokens(tokens)
