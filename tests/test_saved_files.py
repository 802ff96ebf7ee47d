"""Adapters and merged models that version 0.1.0 wrote load and compute what they did."""

from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny_models import load, logits_of
from torch.testing import assert_close

import peft_moice  # noqa: F401

SAVED = Path(__file__).parent / "saved"


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "expected.safetensors")


@pytest.mark.parametrize("name", ["adapter", "cat"])
def test_adapters(name, expected):
    model = PeftModel.from_pretrained(load(str(SAVED / "base")), str(SAVED / name)).eval()
    assert_close(logits_of(model, expected["input_ids"]), expected[name], rtol=0, atol=2e-6)


def test_an_adapter_finds_its_base(expected, monkeypatch):
    monkeypatch.chdir(SAVED)
    model = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
    assert_close(logits_of(model, expected["input_ids"]), expected["adapter"], rtol=0, atol=2e-6)


def test_a_merged_model(expected):
    model = load(str(SAVED / "merged"))
    assert type(model).__name__ == "MoICELlamaForCausalLM"
    assert_close(logits_of(model, expected["input_ids"]), expected["merged"], rtol=0, atol=2e-6)
