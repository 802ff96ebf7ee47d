"""Rope type dynamic: fixed angles up to the original length, and refused where they have grown."""

import copy

import pytest
import torch
from families import tiny_model, tokens
from position_models import assert_close, cached_logits, mixture, one_angle, rotated
from transformers import AutoModelForCausalLM, DynamicCache

pytestmark = pytest.mark.usefixtures("no_grad")

ORIGINAL_LENGTH = 32
GROWN = r"'dynamic' have grown with a sequence beyond the model's original length of 32 tokens"


def dynamic(make, **options):
    """A model whose angles grow beyond its original length."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return make(rope_parameters=rope, max_position_embeddings=ORIGINAL_LENGTH, **options)


@pytest.mark.slow
@pytest.mark.parametrize("length", [20, ORIGINAL_LENGTH])
def test_exact_up_to_the_original_length(length, tmp_path):
    ids = tokens(length=length)
    turned, expected = dynamic(one_angle), dynamic(rotated)(ids).logits
    assert_close(turned(ids).logits, expected)
    assert_close(cached_logits(turned, ids, length - 4), expected)

    model, expected = dynamic(mixture), dynamic(mixture, implementation="reference")(ids).logits
    assert_close(model(ids).logits, expected)
    assert_close(cached_logits(model, ids, length - 4), expected)
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(cached_logits(again, ids, length - 4), expected)
    with pytest.raises(ValueError, match=GROWN):
        again(tokens(length=33))


def test_grown_angles_are_refused_until_a_short_sequence_sets_them_back():
    model, ids = copy.deepcopy(dynamic(mixture)), tokens(length=40)
    expected = model(ids[:, :32]).logits
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=GROWN):
        cached_logits(model, ids, 30, cache)
    with pytest.raises(ValueError, match="Keep below 32 tokens"):
        model(ids[:, :32])
    model(ids[:, :31])
    assert_close(model(ids[:, :32]).logits, expected)


@pytest.mark.slow
def test_the_base_model_may_grow_them():
    model, own, ids = dynamic(mixture), dynamic(tiny_model, model_type="llama"), tokens(length=40)
    cache = DynamicCache(config=own.config)
    with model.disable_adapter():
        assert torch.equal(cached_logits(model, ids[:, :38], 30, cache), cached_logits(own, ids[:, :38], 30))
    with pytest.raises(ValueError, match=GROWN):
        model(ids[:, 38:39], past_key_values=cache)
    base = model.unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    base(ids)
