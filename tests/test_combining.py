"""Combining adapters into one."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from representatives import slow_but
from tiny_models import (
    assert_logits,
    decide,
    layers_of,
    load,
    logits_of,
    logits_with,
    router_state,
    token_ids,
    wide_config,
)

from peft_moice import MoICEConfig
from peft_moice.routing.mixture import LayerMixture
from peft_moice.tuner.combining import Combination, combined_config


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
        assert_logits(model, flat)

    @pytest.mark.slow
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
        resolved = {"top_k": 1, "router_dim": 2, "hidden_act": "silu"}
        first = MoICEConfig(rope_bases={"full": [1e6, 2e6], "sliding": [1e4, 3e4]}, **resolved)
        second = MoICEConfig(rope_bases=[5e5], **resolved)
        for order in ([first, second], [second, first]):
            config = combined_config(Combination(["a", "b"], [0.5, 0.5], "cat", None, "total"), order)
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

    def test_adapters_that_force_different_implementations(self, model):
        model.add_adapter("forced", wide_config(implementation="reference"))
        model.add_adapter("forced otherwise", wide_config(implementation="delegated"))
        model.add_weighted_adapter(["a", "forced"], [0.5, 0.5], "mean")
        assert model.peft_config["mean"].implementation == "reference"
        with pytest.raises(ValueError, match="different implementations"):
            model.add_weighted_adapter(["forced", "forced otherwise"], [0.5, 0.5], "mean of both")

    @pytest.mark.parametrize(
        "kind", slow_but(["ties"], ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
    )
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

    def test_bad_input(self, model):
        for name, extra in (("heads", {"modules_to_save": ["lm_head"]}), ("tokens", {"trainable_token_indices": [3]})):
            model.add_adapter(name, wide_config(**extra))
        model.add_adapter("first", wide_config(layers_to_transform=[0]))
        before = set(model.peft_config)
        for arguments, message in (
            ((["a", "first"], [0.5, 0.5], "new"), "'a' and 'first' adapt different modules"),
            ((["a", "heads"], [0.5, 0.5], "new"), "'heads' has trained more than its routers"),
            ((["a", "tokens"], [0.5, 0.5], "new"), "'tokens' has trained more than its routers"),
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
        ):
            with pytest.raises(ValueError, match=message):
                model.add_weighted_adapter(*arguments)
        assert set(model.peft_config) == before
