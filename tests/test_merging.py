"""Building routers into the model reversibly."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from tiny_models import assert_logits, decide, layers_of, load, logits_of, logits_with, wide_config


class TestMergeAdapter:
    @pytest.mark.parametrize("adapters", [["a"], ["a", "b"], ["a", "other"]])
    def test_outputs_stay_and_unmerging_restores_them(self, model, adapters):
        expected = logits_with(model, *adapters)
        model.merge_adapter()
        assert layers_of(model)[0].merged_adapters == adapters
        assert_logits(model, expected)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), expected)

    def test_merging_one_after_the_other_is_merging_both(self, model):
        expected = logits_with(model, "a", "b")
        model.merge_adapter(["a"])
        with pytest.warns(UserWarning, match="additionally merging b"):
            model.merge_adapter(["b"])
        assert_logits(model, expected)

    def test_merging_twice_is_said_and_changes_nothing(self, model):
        expected = logits_with(model, "a")
        with pytest.warns(UserWarning, match="No adapter is merged"):
            model.unmerge_adapter()
        with pytest.raises(ValueError, match=r"no adapter 'c'; this model has \['a', 'b', 'other'\]"):
            model.merge_adapter(["c"])
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(logits_of(model), expected)
        assert layers_of(model)[0].merged_adapters == ["a"]

    def test_a_named_adapter_is_merged_saved_and_unmerged_by_disabling(self, model, llama, tmp_path):
        expected = logits_with(model, "other")
        model.set_adapter("a")
        model.merge_adapter(["other"])
        assert_logits(model, expected)
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "other")
        assert torch.equal(logits_of(loaded), expected)
        decide(model, "other", seed=9)  # what is merged does not follow
        assert_logits(model, expected)
        with model.disable_adapter():
            assert torch.equal(logits_of(model), logits_of(load(llama)))
            assert not layers_of(model)[0].merged

    @pytest.mark.slow
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_unmerge_by_themselves(self, model, duplicate):
        expected = logits_with(model, "a")
        model.merge_adapter()
        merged, twin = logits_of(model), duplicate(model)
        assert torch.equal(logits_of(twin), merged)
        twin.unmerge_adapter()
        twin.set_adapter("b")
        assert not torch.equal(logits_of(twin), expected)
        assert torch.equal(logits_of(model), merged)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), expected)
        attention = layers_of(model)[0].base_layer
        assert not attention._forward_pre_hooks and not attention._forward_pre_hooks_with_kwargs

    @pytest.mark.slow
    def test_merging_where_forward_hangs_on_the_instance(self, llama):
        """As after accelerate's `dispatch_model`, which hides the forward of the module's class."""
        base = load(llama)
        dispatch_model(base, {"": "cpu"}, force_hooks=True)
        model = get_peft_model(base, wide_config()).eval()
        decide(model)
        expected = logits_of(model)
        assert "forward" in vars(layers_of(model)[0].base_layer)
        model.merge_adapter()
        assert_logits(model, expected)
        model.unmerge_adapter()
        assert_logits(model.merge_and_unload(), expected)
