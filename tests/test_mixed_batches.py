"""Rows of a batch under different adapters."""

import threading

import pytest
import torch
from peft import get_peft_model
from representatives import slow_but
from tiny_models import decide, layers_of, load, logits_of, logits_with, token_ids, wide_config
from transformers import GenerationConfig

from peft_moice import MoICEConfig

GENERATION = [
    {"max_new_tokens": 6, "num_beams": 1, "do_sample": False},
    {"max_new_tokens": 6, "num_beams": 2, "do_sample": False},
    # Several texts of a prompt; the single token that `top_k` leaves makes samples certain.
    {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
]


@torch.no_grad()
def logits_of_rows(model, ids: torch.Tensor, names) -> torch.Tensor:
    return model(ids, adapter_names=list(names)).logits


class TestMixedBatches:
    NAMES = ("a", "other", "__base__")

    def test_every_row_is_what_it_is_alone(self, model, llama):
        ids = token_ids(3)
        alone = [logits_of(load(llama), ids[2:])]
        for row, name in ((1, "other"), (0, "a")):
            model.set_adapter(name)
            alone.insert(0, logits_of(model, ids[row : row + 1]))
        mixed = logits_of_rows(model, ids, self.NAMES)
        torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        assert torch.equal(logits_of(model, ids[:1]), alone[0]), "hooks were left behind"

    @pytest.mark.parametrize("options", slow_but(GENERATION[:1], GENERATION), ids=str)
    def test_generate(self, model, llama, options):
        ids = token_ids(3)
        given = {"generation_config": GenerationConfig(**options)} if "top_k" in options else options
        mixed = model.generate(input_ids=ids, adapter_names=list(self.NAMES), **given)
        expected = [load(llama).generate(input_ids=ids[2:], **options)]
        for row, name in ((1, "other"), (0, "a")):
            model.set_adapter(name)
            expected.insert(0, model.generate(input_ids=ids[row : row + 1], **options))
        assert torch.equal(mixed, torch.cat(expected))

    def test_other_threads_run_batches_of_their_own(self, model):
        """A mixed batch waits in its first layer until another thread's pass is over."""
        ids, mixed = token_ids(2), []
        expected = {name: logits_with(model, name) for name in ("other", "a")}
        inside, over = threading.Event(), threading.Event()

        def wait(*_):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                over.wait()

        def run():
            mixed.append(logits_of_rows(model, ids, ["other"] * 2))

        layers_of(model)[0].register_forward_hook(wait)
        thread = threading.Thread(target=run)
        thread.start()
        inside.wait()
        own = logits_of(model)
        over.set()
        thread.join()
        torch.testing.assert_close(own, expected["a"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[0], expected["other"], rtol=1e-5, atol=1e-5)

    def test_a_layer_without_the_adapter_runs_as_the_base_model(self, llama):
        model = get_peft_model(load(llama), wide_config(layers_to_transform=[0]), adapter_name="a")
        model.add_adapter("b", wide_config())
        decide(model, "a")
        decide(model, "b", seed=1)
        ids = token_ids(2)
        model.eval()
        mixed = logits_of_rows(model, ids, "ab")
        expected = []
        for row, name in enumerate("ab"):
            model.set_adapter(name)
            expected.append(logits_of(model, ids[row : row + 1]))
        torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=1e-5)

    def test_an_angle_other_than_the_own_beside_the_base_model(self, llama):
        model = get_peft_model(load(llama), MoICEConfig(rope_bases=[77.0], task_type="CAUSAL_LM")).eval()
        ids = token_ids(2)
        mixed = logits_of_rows(model, ids, ("default", "__base__"))
        torch.testing.assert_close(mixed[:1], logits_of(model, ids[:1]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[1:], logits_of(load(llama), ids[1:]), rtol=1e-5, atol=1e-5)

    def test_disabling_comes_first_and_rows_may_be_the_base_model_s_alone(self, model, llama):
        base_only = logits_of_rows(model, token_ids(), ["__base__"] * 2)
        with model.disable_adapter():
            disabled = logits_of_rows(model, token_ids(), ("a", "other"))
        expected = logits_of(load(llama))
        assert torch.equal(base_only, expected) and torch.equal(disabled, expected)

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
