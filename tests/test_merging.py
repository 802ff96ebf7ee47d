"""Combining adapters, mixed batches, and building routers into the model reversibly."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from tiny_models import decide, layers_of, load, logits_of, router_state, token_ids, wide_config

from peft_moice import MoICEConfig
from peft_moice.combining import combined_config
from peft_moice.mixture import LayerMixture

OTHER = {"base_multipliers": [1.0, 3.0, 0.3], "top_k": 1, "router_scope": "head"}


@pytest.fixture
def model(llama) -> PeftModel:
    """Adapters "a" and "b" of the same shape, and "other" with other angles and routers per head. "a" is active."""
    model = get_peft_model(load(llama), wide_config(), adapter_name="a")
    model.add_adapter("b", wide_config())
    model.add_adapter("other", wide_config(**OTHER))
    for seed, name in enumerate(("a", "b", "other")):
        decide(model, name, seed=seed)
    return model.eval()


def logits_with(model: PeftModel, *adapters: str) -> torch.Tensor:
    model.base_model.set_adapter(list(adapters))
    return logits_of(model)


class TestMergeAdapter:
    @pytest.mark.parametrize("adapters", [["a"], ["a", "b"], ["a", "other"]])
    def test_outputs_stay_and_unmerging_restores_them(self, model, adapters):
        expected = logits_with(model, *adapters)
        model.merge_adapter()
        assert layers_of(model)[0].merged_adapters == adapters
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), expected)

    def test_named_adapters_take_effect_whatever_is_active(self, model):
        expected = logits_with(model, "other")
        model.set_adapter("a")
        model.merge_adapter(["other"])
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)

    def test_merging_one_after_the_other_is_merging_both(self, model):
        expected = logits_with(model, "a", "b")
        model.merge_adapter(["a"])
        with pytest.warns(UserWarning, match="additionally merging b"):
            model.merge_adapter(["b"])
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)

    def test_merging_twice_is_said_and_changes_nothing(self, model):
        expected = logits_with(model, "a")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(logits_of(model), expected)
        assert layers_of(model)[0].merged_adapters == ["a"]

    def test_unmerging_nothing_is_said(self, model):
        with pytest.warns(UserWarning, match="No adapter is merged"):
            model.unmerge_adapter()

    def test_merged_routers_do_not_follow_later_changes(self, model):
        expected = logits_with(model, "a")
        model.merge_adapter()
        decide(model, "a", seed=9)
        assert torch.equal(logits_of(model), expected)
        model.unmerge_adapter()
        assert not torch.equal(logits_of(model), expected)

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

    def test_merging_where_forward_hangs_on_the_instance(self, llama):
        """As after accelerate's `dispatch_model`, which hides the forward of the module's class."""
        base = load(llama)
        dispatch_model(base, {"": "cpu"}, force_hooks=True)
        model = get_peft_model(base, wide_config()).eval()
        decide(model)
        expected = logits_of(model)
        assert "forward" in vars(layers_of(model)[0].base_layer)
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)
        model.unmerge_adapter()
        torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=0, atol=1e-6)

    def test_disabling_unmerges(self, model, llama):
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits_of(model), logits_of(load(llama)))
            assert not layers_of(model)[0].merged

    def test_safe_merge_refuses_nan(self, model):
        next(layers_of(model)[1].moice_router["a"].parameters()).data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="The adapter a seems to be broken"):
            model.merge_adapter(safe_merge=True)

    def test_a_merged_adapter_is_saved_as_if_unmerged(self, model, llama, tmp_path):
        expected = logits_with(model, "a")
        model.merge_adapter()
        model.save_pretrained(tmp_path, selected_adapters=["a"])
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "a")
        assert torch.equal(logits_of(loaded), expected)

    def test_unknown_adapter(self, model):
        with pytest.raises(ValueError, match=r"no adapter 'c'; this model has \['a', 'b', 'other'\]"):
            model.merge_adapter(["c"])


class TestAddWeightedAdapter:
    def test_cat_is_the_weighted_mean_of_gates(self, model):
        model.add_weighted_adapter(["a", "other"], [0.3, 0.7], "mean")
        layer = layers_of(model)[0]
        query = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))

        def gates(name: str, bases: tuple[float, ...]) -> torch.Tensor:
            layer.set_adapter([name])
            return LayerMixture(layer.shares(), layer.rope).gate(query, bases).gates

        bases = tuple(model.peft_config["mean"].rope_bases)
        assert len(bases) == 6
        torch.testing.assert_close(gates("mean", bases), 0.3 * gates("a", bases) + 0.7 * gates("other", bases))

    def test_cat_in_equal_shares_is_having_both_active(self, model):
        expected = logits_with(model, "a", "other")
        model.add_weighted_adapter(["a", "other"], [0.5, 0.5], "mean", combination_type="cat")
        torch.testing.assert_close(logits_with(model, "mean"), expected, rtol=0, atol=1e-6)

    def test_cat_is_an_ordinary_adapter(self, model, llama, tmp_path):
        """Saved, loaded, combined again, merged, trained."""
        model.add_weighted_adapter(["a", "other"], [0.25, 0.75], "mean")
        expected = logits_with(model, "mean")
        model.save_pretrained(tmp_path, selected_adapters=["mean"])
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "mean", is_trainable=True)
        assert torch.equal(logits_of(loaded), expected)
        loaded.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in loaded.parameters() if p.requires_grad)
        assert sum(p.requires_grad for p in loaded.parameters()) == 3 * 6

        model.add_weighted_adapter(["mean", "b"], [0.4, 0.6], "mean of means")
        model.add_weighted_adapter(["a", "other", "b"], [0.1, 0.3, 0.6], "at once")
        nested, flat = logits_with(model, "mean of means"), logits_with(model, "at once")
        torch.testing.assert_close(nested, flat, rtol=0, atol=1e-6)
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model), flat, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("order", [("a", "one"), ("one", "a"), ("one", "two")])
    def test_cat_takes_adapters_in_any_order(self, model, llama, tmp_path, order):
        """An adapter with a single angle may have one that is not the model's own."""
        model.add_adapter("one", MoICEConfig(rope_bases=[30000.0], task_type="CAUSAL_LM"))
        model.add_adapter("two", MoICEConfig(rope_bases=[5000.0], task_type="CAUSAL_LM"))
        expected = logits_with(model, *order)
        model.add_weighted_adapter(list(order), [0.5, 0.5], "mean")
        torch.testing.assert_close(logits_with(model, "mean"), expected, rtol=0, atol=1e-6)
        model.save_pretrained(tmp_path, selected_adapters=["mean"])
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / "mean")
        assert torch.equal(logits_of(loaded), logits_with(model, "mean"))

    @pytest.mark.parametrize("order", [("a", "other", "one"), ("one", "other", "a")])
    def test_every_field_of_cats_config_is_true(self, model, order):
        model.add_adapter("one", MoICEConfig(rope_bases=[700.0], task_type="CAUSAL_LM", router_aux_loss_coef=0.1))
        model.add_weighted_adapter(list(order), [0.25, 0.25, 0.5], "mean")
        config = model.peft_config["mean"]
        assert config.rope_bases == [10000.0, 700.0, 2500.0, 3000.0, 5000.0, 30000.0, 40000.0]
        assert config.top_k == 2 + 1 + 1
        assert [member["top_k"] for member in config.members] == [model.peft_config[name].top_k for name in order]
        assert [member["weight"] for member in config.members] == [0.25, 0.25, 0.5]
        assert (config.router_dim, config.router_scope, config.router_aux_loss_coef) == (None, None, None)
        assert (config.hidden_act, config.init_weights, config.implementation) == ("silu", True, "auto")

    def test_cat_of_more_picks_than_angles(self, model):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
        for name in ("d", "e"):
            model.add_adapter(name, wide_config(top_k=3))
        model.add_weighted_adapter(["d", "e"], [0.5, 0.5], "more")
        assert (model.peft_config["mean"].top_k, model.peft_config["more"].top_k) == (4, 4)
        assert (model.peft_config["mean"].router_dim, model.peft_config["mean"].router_scope) == (4, "layer")

    def test_cat_with_angles_by_layer_type(self):
        first = MoICEConfig(rope_bases={"full": [1e6, 2e6], "sliding": [1e4, 3e4]}, top_k=1, router_dim=2)
        second = MoICEConfig(rope_bases=[5e5], top_k=1, router_dim=2)
        for order in ([first, second], [second, first]):
            config = combined_config(["a", "b"], order, [0.5, 0.5], "cat", None)
            assert config.rope_bases == {"full": [1e6, 5e5, 2e6], "sliding": [1e4, 3e4, 5e5]}
            assert config.top_k == 2

    @pytest.mark.parametrize("kind", ["cat", "linear"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_routers_stay_in_float32_over_half_precision(self, llama, kind, dtype):
        model = get_peft_model(load(llama, dtype=dtype), wide_config(), adapter_name="a")
        model.add_adapter("b", wide_config())
        decide(model, "a")
        decide(model, "b", seed=1)
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type=kind)
        assert {weight.dtype for weight in router_state(model, "mean").values()} == {torch.float32}
        for layer in layers_of(model):
            a, b = layer.routers("a")[0].gate_proj, layer.routers("b")[0].gate_proj
            expected = [a, b] if kind == "cat" else [0.5 * a + 0.5 * b]
            assert all(torch.equal(x.gate_proj, y) for x, y in zip(layer.routers("mean"), expected, strict=True))

    @pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
    def test_what_was_trained_beside_routers_is_not_lost_in_silence(self, model, extra):
        model.add_adapter("more", wide_config(**extra))
        with pytest.raises(ValueError, match="'more' has trained more than its routers"):
            model.add_weighted_adapter(["a", "more"], [0.5, 0.5], "mean")

    def test_adapters_that_force_different_implementations(self, model):
        model.add_adapter("forced", wide_config(implementation="reference"))
        model.add_adapter("forced otherwise", wide_config(implementation="delegated"))
        model.add_weighted_adapter(["a", "forced"], [0.5, 0.5], "mean")
        assert model.peft_config["mean"].implementation == "reference"
        with pytest.raises(ValueError, match="different implementations"):
            model.add_weighted_adapter(["forced", "forced otherwise"], [0.5, 0.5], "mean of both")

    @pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
    def test_router_weights_are_combined_by_pefts_functions(self, model, kind):
        # PEFT prunes at random for the "dare" types; keeping all values makes them comparable.
        density = None if kind == "linear" else 1.0 if "dare" in kind else 0.5
        model.add_weighted_adapter(["a", "b"], [0.4, 0.6], "new", combination_type=kind, density=density)
        function = merge_utils.task_arithmetic if kind == "linear" else getattr(merge_utils, kind)
        options = [] if kind == "linear" else [density]
        options += ["total"] if "ties" in kind else []
        a, b, new = (router_state(model, name) for name in ("a", "b", "new"))
        for name, actual in new.items():
            sources = [a[name.replace(".new.", ".a.")], b[name.replace(".new.", ".b.")]]
            assert torch.equal(actual, function(sources, torch.tensor([0.4, 0.6]), *options))

    def test_sources_and_activation_stay(self, model):
        before = {name: router_state(model, name) for name in ("a", "b")}
        expected = logits_with(model, "a")
        model.add_weighted_adapter(["a", "b"], [2.0, -1.0], "new", combination_type="linear")
        assert model.active_adapters == ["a"]
        assert torch.equal(logits_of(model), expected)
        for name, state in before.items():
            assert all(torch.equal(value, router_state(model, name)[key]) for key, value in state.items())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a", "c"], [0.5, 0.5], "new"), "no adapter 'c'"),
            ((["a", "b"], [0.5, 0.5], "other"), "adapter called 'other' already"),
            ((["a", "b"], [1.0], "new"), "one weight per adapter"),
            (([], [], "new"), "one weight per adapter"),
            ((["a", "b"], [0.5, 0.6], "new"), "sum to one"),
            ((["a", "b"], [1.5, -0.5], "new"), "have to be positive"),
            ((["a", "b"], [0.5, float("nan")], "new", "linear"), "have to be finite"),
            ((["a", "b"], [0.5, 0.5], "new", "svd"), "'svd'; choose one of"),
            ((["a", "b"], [0.5, 0.5], "new", "ties"), "`density` is None"),
            ((["a", "b"], [0.5, 0.5], "new", "ties", 1.5), "`density` is 1.5"),
            ((["a", "other"], [0.5, 0.5], "new", "linear"), "'a' and 'other' differ.*combination_type='cat'"),
        ],
    )
    def test_bad_input(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert set(model.peft_config) == {"a", "b", "other"}

    def test_adapters_on_other_layers(self, model):
        model.add_adapter("first", wide_config(layers_to_transform=[0]))
        with pytest.raises(ValueError, match="'a' and 'first' adapt different modules"):
            model.add_weighted_adapter(["a", "first"], [0.5, 0.5], "new")


class TestMixedBatches:
    NAMES = ("a", "other", "__base__")

    def test_every_row_is_what_it_is_alone(self, model, llama):
        ids = token_ids(3)
        alone = [logits_of(load(llama), ids[2:])]
        for row, name in ((1, "other"), (0, "a")):
            model.set_adapter(name)
            alone.insert(0, logits_of(model, ids[row : row + 1]))
        with torch.no_grad():
            mixed = model(ids, adapter_names=list(self.NAMES)).logits
        torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        assert torch.equal(logits_of(model, ids[:1]), alone[0]), "hooks were left behind"

    def test_rows_of_the_base_model_only(self, model, llama):
        with torch.no_grad():
            logits = model(token_ids(), adapter_names=["__base__"] * 2).logits
        assert torch.equal(logits, logits_of(load(llama)))

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_generate(self, model, llama, num_beams):
        ids = token_ids(3)
        options = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
        mixed = model.generate(input_ids=ids, adapter_names=list(self.NAMES), **options)
        expected = [load(llama).generate(input_ids=ids[2:], **options)]
        for row, name in ((1, "other"), (0, "a")):
            model.set_adapter(name)
            expected.insert(0, model.generate(input_ids=ids[row : row + 1], **options))
        assert torch.equal(mixed, torch.cat(expected))

    def test_a_layer_without_the_adapter_runs_as_the_base_model(self, llama):
        model = get_peft_model(load(llama), wide_config(layers_to_transform=[0]), adapter_name="a")
        model.add_adapter("b", wide_config())
        decide(model, "a")
        decide(model, "b", seed=1)
        ids = token_ids(2)
        model.eval()
        with torch.no_grad():
            mixed = model(ids, adapter_names=["a", "b"]).logits
        expected = []
        for row, name in enumerate("ab"):
            model.set_adapter(name)
            expected.append(logits_of(model, ids[row : row + 1]))
        torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=1e-5)

    def test_an_angle_other_than_the_own_beside_the_base_model(self, llama):
        model = get_peft_model(load(llama), MoICEConfig(rope_bases=[77.0], task_type="CAUSAL_LM")).eval()
        ids = token_ids(2)
        with torch.no_grad():
            mixed = model(ids, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed[:1], logits_of(model, ids[:1]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[1:], logits_of(load(llama), ids[1:]), rtol=1e-5, atol=1e-5)

    def test_disabling_comes_first(self, model, llama):
        with model.disable_adapter(), torch.no_grad():
            logits = model(token_ids(), adapter_names=["a", "other"]).logits
        assert torch.equal(logits, logits_of(load(llama)))

    def test_bad_input(self, model):
        with pytest.raises(ValueError, match="no adapter 'c'"):
            model(token_ids(), adapter_names=["a", "c"])
        with pytest.raises(ValueError, match="but got 3 and 2"):
            model(token_ids(), adapter_names=["a", "b", "a"])
        with pytest.raises(ValueError, match="in training mode"):
            model.train()(token_ids(), adapter_names=["a", "b"])
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(token_ids(), adapter_names=["a", "b"])
