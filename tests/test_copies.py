"""Copies, pickles and moves of an adapted model."""

import copy
import pickle

import pytest
import torch
from tiny_models import decide, layers_of, logits_of, router_state, token_ids


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
    assert torch.equal(logits_of(twin.eval().unload()), logits_of(adapted.unload()))


def test_a_copy_follows_its_own_attention_implementation(adapted):
    twin = copy.deepcopy(adapted)
    twin.base_model.model.set_attn_implementation("eager")
    assert layers_of(twin)[0].config is not layers_of(adapted)[0].config
    with torch.no_grad():
        assert twin(token_ids(), output_attentions=True).attentions is not None
        assert adapted(token_ids()).logits is not None
    assert adapted.config._attn_implementation == "sdpa"


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
