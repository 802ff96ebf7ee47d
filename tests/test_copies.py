"""Copies, pickles and moves of an adapted model."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny_models import decide, layers_of, load, logits_of, router_state, token_ids, wide_config


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(adapted, duplicate):
    twin = duplicate(adapted)
    expected = logits_of(adapted)
    assert torch.equal(logits_of(twin), expected)
    decide(twin, seed=5)
    assert not torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(adapted), expected)
    twin.set_adapter("default")
    twin.train()
    assert twin(token_ids(), labels=token_ids()).aux_loss > 0


def test_a_copy_follows_its_own_attention_implementation(adapted):
    twin = copy.deepcopy(adapted)
    twin.base_model.model.set_attn_implementation("eager")
    assert layers_of(twin)[0].config is not layers_of(adapted)[0].config
    with torch.no_grad():
        assert twin(token_ids(), output_attentions=True).attentions is not None
        assert adapted(token_ids()).logits is not None
    assert adapted.config._attn_implementation == "sdpa"


def test_torch_save_of_the_whole_model(adapted, tmp_path):
    torch.save(adapted, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(twin), logits_of(adapted))
    assert torch.equal(logits_of(twin.unload()), logits_of(adapted.unload()))


def test_a_state_dict_restores_the_model(llama, adapted, tmp_path):
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    other = get_peft_model(load(llama), wide_config()).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits_of(other), logits_of(adapted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(adapted, dtype):
    expected = logits_of(adapted)
    adapted.to(dtype)
    assert {weight.dtype for weight in router_state(adapted).values()} == {dtype}
    moved = logits_of(adapted)
    assert moved.dtype == dtype
    # Rounding may turn a close choice among the top K, so the bulk is compared.
    tolerance = 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (moved.float() - expected).abs().median() < tolerance * expected.abs().max()
