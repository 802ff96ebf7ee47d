"""Under another default device (here one without values), everything happens where the model is."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import decide, load, logits_of, save_tiny_model, token_ids, wide_config
from transformers import AutoTokenizer

from peft_moice import check, explain
from peft_moice.evaluation.angles import attention_waveform
from peft_moice.evaluation.losses import losses_by_position

pytestmark = pytest.mark.slow

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10_000.0}
LONGROPE["original_max_position_embeddings"] = 64


@pytest.mark.parametrize(("family", "overrides"), [("llama", {"rope_parameters": LONGROPE}), ("gemma3", {})])
def test_the_life_of_an_adapter(tmp_path, family, overrides):
    # The caches of sliding windows ask another default device where they stand.
    folder = save_tiny_model(tmp_path / "base", family, use_cache=False, **overrides)

    def life(default_device) -> list[torch.Tensor]:
        base, second_base, ids = load(folder), load(folder), token_ids()
        with default_device:
            model = get_peft_model(base, wide_config(init_weights="identity", router_aux_loss_coef=0.5))
            model.add_adapter("second", wide_config(router_scope="head"))
        for seed, name in enumerate(("default", "second")):
            decide(model.eval(), name, seed)
        with default_device, torch.no_grad():
            found = [logits_of(model, ids), model(ids, adapter_names=["second", "__base__"]).logits]
            found.append(model.train()(ids, labels=ids).loss)
            model.eval().add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
            model.set_adapter("mean")
            check(model)
            found.append(logits_of(model, ids))
            model.save_pretrained(tmp_path / "adapter")
            found.append(logits_of(PeftModel.from_pretrained(second_base, tmp_path / "adapter/mean"), ids))
            found.append(logits_of(model.merge_and_unload(), ids))
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
        return found

    for found, expected in zip(life(torch.device("meta")), life(nullcontext()), strict=True):
        assert torch.equal(found, expected)


def test_measuring(adapted, llama):
    tokenizer, text = AutoTokenizer.from_pretrained(llama), "w3 w4 w5 w6 w7 w8 w9 w10 w11"

    def measured() -> tuple:
        losses = losses_by_position(adapted, tokenizer, text, chunk_length=8)
        waveform = attention_waveform(16, 10_000.0, 20).tolist()
        return explain(adapted, tokenizer, text), losses, waveform

    with torch.device("meta"):
        found = measured()
    (explanation, *others), (expected, *expected_others) = found, measured()
    assert others == expected_others
    assert torch.equal(explanation.gates, expected.gates)
