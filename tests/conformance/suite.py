"""PEFT's own test classes with `MoICEConfig` in place of PEFT's configs.

Run by `run_peft_suite.py`, which provides the package `peft_tests` (PEFT's tests, from its source distribution) and
the folder `$PEFT_SUITE_MODELS` with one tiny model per family.
"""

import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft_tests import test_custom_models, test_decoder_models, testing_common
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moice import MoICEConfig

MODELS = sorted(str(folder) for folder in Path(os.environ["PEFT_SUITE_MODELS"]).iterdir())
WIDE = [1.0, 0.1, 10.0]
"""Angles that change the output of the suite's very short inputs visibly."""

CONFIGS = {
    "released": {},
    "wide": {"base_multipliers": WIDE, "top_k": 2},
    "per head": {"base_multipliers": WIDE, "router_scope": "head", "router_dim": 5},
    "tokens": {"base_multipliers": WIDE, "trainable_token_indices": [0, 1, 3]},
}
FAR = {"base_multipliers": [1.0, 1e-3, 1e3], "top_k": 1, "init_weights": False}
"""For tests that want two random adapters to differ by much, which the released angles on eight tokens do not."""
DECIDED = {name: {**CONFIGS[name], "init_weights": False} for name in ("wide", "per head")}
"""Routers that decide from the start, for tests that compare outputs."""


def hide_other_tests(cls: type, *lists: list) -> type:
    """Hide the tests of `cls` that run over none of `lists`: those of other tuners, with configs of their own."""
    for name in dir(cls):
        if name.startswith("test_"):
            marks = getattr(getattr(cls, name), "pytestmark", [])
            if not any(mark.args[1] is values for mark in marks if mark.name == "parametrize" for values in lists):
                setattr(cls, name, None)
    return cls


# pytest reads these lists, which PEFT's decorators hold, when it collects the tests below.
test_decoder_models.PEFT_DECODER_MODELS_TO_TEST[:] = MODELS
test_decoder_models.ALL_CONFIGS[:] = [
    pytest.param(MoICEConfig, {"task_type": "CAUSAL_LM", **fields}, id=name) for name, fields in CONFIGS.items()
]
test_custom_models.TEST_CASES[:] = [
    pytest.param(f"{Path(model).name} {name}", model, MoICEConfig, fields, id=f"{Path(model).name}-{name}")
    for model in MODELS
    for name, fields in DECIDED.items()
]
test_custom_models.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (name, "moice", MoICEConfig, {**DECIDED["wide"], **one}, {**DECIDED["wide"], **other})
    for name, one, other in (
        ("same", {}, {}),
        ("other angles", {}, {"base_multipliers": [1.0, 0.1, 100.0, 30.0], "top_k": 1}),
        ("other layers", {"layers_to_transform": [0]}, {"layers_to_transform": [1, 2]}),
    )
]
test_custom_models.MIXED_ADAPTER_TEST_CASES[:] = [
    ("moice", MoICEConfig(**DECIDED["wide"]), MoICEConfig(**DECIDED["per head"]))
]
# Skips every test of a model whose path contains "llama", whatever the config.
test_decoder_models.check_beft_config = lambda *args: None


class CustomModel(nn.Module):
    """A model of no library around a transformers decoder: floats in, log-probabilities out."""

    def __init__(self, folder: str, dtype: torch.dtype):
        super().__init__()
        language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.decoder = language_model.model
        self.head = language_model.lm_head
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):  # the argument's name in PEFT's tests
        hidden_states = self.decoder(X.long() % 61 + 2, use_cache=False).last_hidden_state
        return self.sm(self.head(hidden_states)[:, -1])


class CustomModels:
    """PEFT's tests make models by `from_pretrained(model_id)`."""

    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        torch.manual_seed(0)
        return CustomModel(model_id, dtype or torch.float32)


class TestDecoders(test_decoder_models.TestDecoderModels):
    def prepare_inputs_for_testing(self):
        # PEFT's rows repeat one token, so that all values are equal and attention cannot matter.
        input_ids = torch.tensor([[5, 9, 2, 7, 11, 3, 8, 4], [0, 0, 6, 3, 12, 9, 10, 2]])
        return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}

    @pytest.fixture
    def as_lora(self, monkeypatch):
        """Let the lists of tuners that support mixed batches, closed inside PEFT's tests, take us for LoRA."""
        monkeypatch.setattr(testing_common, "LoraConfig", MoICEConfig)

    @pytest.mark.parametrize("model_id", MODELS)
    @pytest.mark.parametrize("config_cls,config_kwargs", test_decoder_models.ALL_CONFIGS)
    def test_mixed_adapter_batches(self, model_id, config_cls, config_kwargs, as_lora):
        self._test_mixed_adapter_batches(model_id, config_cls, {**config_kwargs, "init_weights": False})

    @pytest.mark.parametrize("model_id", MODELS)
    @pytest.mark.parametrize("config_cls,config_kwargs", test_decoder_models.ALL_CONFIGS)
    def test_generate_with_mixed_adapter_batches(self, model_id, config_cls, config_kwargs, as_lora):
        self._test_generate_with_mixed_adapter_batches_and_beam_search(model_id, config_cls, {**config_kwargs, **FAR})

    @pytest.mark.parametrize("model_id", MODELS)
    @pytest.mark.parametrize("config_cls,config_kwargs", test_decoder_models.ALL_CONFIGS)
    def test_merge_layers_multi(self, model_id, config_cls, config_kwargs):
        self._test_merge_layers_multi(model_id, config_cls, {**config_kwargs, **FAR})


class TestCustomModels(test_custom_models.TestPeftCustomModel):
    transformers_class = CustomModels

    # These two expect that a fresh adapter changes nothing, which is one of our two starts.
    @pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", test_custom_models.TEST_CASES)
    def test_disable_adapters(self, test_name, model_id, config_cls, config_kwargs):
        config_kwargs = {**config_kwargs, "init_weights": "identity"}
        super().test_disable_adapters(test_name, model_id, config_cls, config_kwargs)

    @pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", test_custom_models.TEST_CASES)
    def test_disable_adapters_with_merging(self, test_name, model_id, config_cls, config_kwargs):
        config_kwargs = {**config_kwargs, "init_weights": "identity"}
        super().test_disable_adapters_with_merging(test_name, model_id, config_cls, config_kwargs)


class TestMultipleActiveAdapters(test_custom_models.TestMultipleActiveAdapters):
    def resolve_model_cls(self, tuner_method):
        return CustomModels.from_pretrained(MODELS[0])


class TestMixedAdapterBatches(test_custom_models.TestMixedAdapterBatches):
    def get_mlp_peft(self, config0, config1):
        model = get_peft_model(CustomModels.from_pretrained(MODELS[0]), config0, "adapter0").eval()
        model.add_adapter("adapter1", config1)
        return model


hide_other_tests(TestDecoders, test_decoder_models.ALL_CONFIGS)
hide_other_tests(TestCustomModels, test_custom_models.TEST_CASES)
hide_other_tests(TestMultipleActiveAdapters, test_custom_models.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
hide_other_tests(TestMixedAdapterBatches, test_custom_models.MIXED_ADAPTER_TEST_CASES)
