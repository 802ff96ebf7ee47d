"""A model goes with its last name, without the garbage collector: gigabytes of a GPU would wait for it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import load, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM

import peft_moice

pytestmark = pytest.mark.slow


def fail(*_):
    raise ZeroDivisionError


def adapted(folder, **overrides) -> PeftModel:
    model = get_peft_model(load(folder), wide_config(**overrides))
    model(token_ids(), labels=token_ids()).loss.backward()
    return model


def refused(folder, **overrides) -> torch.nn.Module:
    base = load(folder)
    with pytest.raises(ValueError):
        get_peft_model(base, wide_config(**overrides))
    return base


def refused_by_the_probe(folder) -> torch.nn.Module:
    base = load(folder)
    base.model.layers[1].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(ValueError, match="could not be run on its own"):
        get_peft_model(base, wide_config())
    return base


def combined(folder) -> PeftModel:
    model = adapted(folder)
    model.add_adapter("second", wide_config())
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    model(token_ids())
    model.delete_adapter("second")
    peft_moice.check(model)
    return model


@pytest.mark.parametrize(
    "make",
    [
        adapted,
        lambda folder: adapted(folder).unload(),
        lambda folder: adapted(folder).merge_and_unload(),
        lambda folder: refused(folder, target_modules=["self_attn", "mlp"]),
        lambda folder: refused(folder, trainable_token_indices={"no_such_module": [3]}),
        refused_by_the_probe,
        combined,
        lambda folder: copy.deepcopy(adapted(folder)),
    ],
)
def test_freed_at_once(llama, make):
    assert_freed(make, llama)


def test_a_merged_model_is_freed_at_once(llama, tmp_path):
    adapted(llama).merge_and_unload().save_pretrained(tmp_path)
    assert_freed(AutoModelForCausalLM.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_angles_that_grow_are_watched_and_the_model_is_freed(tmp_path, copied):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = save_tiny_model(tmp_path, rope_parameters=dynamic)

    def make():
        model = copied(adapted(folder))
        with pytest.raises(ValueError, match="have grown"):
            model(token_ids(1, 200))
        return model

    assert_freed(make)


def assert_freed(make, *args) -> None:
    make(*args)  # what is made once in a process is none of the model's
    gc.collect()
    gc.disable()
    try:
        model = make(*args)
        parts = {name: weakref.ref(module) for name, module in model.named_modules()}
        del model
        assert not [name for name, part in parts.items() if part() is not None]
    finally:
        gc.enable()
