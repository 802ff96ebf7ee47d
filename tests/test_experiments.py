"""The scripts behind docs/experiments.md compute what they say."""

import random
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import load, logits_of, save_tiny_model, token_ids
from transformers import AutoTokenizer

from peft_moice.evaluation import gates_along

EXPERIMENTS = Path(__file__).parent.parent / "docs" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import forms  # noqa: E402
import frozen  # noqa: E402
import methods  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.__name__)
def test_answers_stand_in_their_prompts(form):
    text = forms.docstrings()
    for seed in range(20):
        shown, pairs = form(random.Random(seed), text)
        assert len({question for question, _ in pairs}) == len(pairs) >= 4
        assert all(answer in shown for _, answer in pairs)
        assert not shown.startswith("{") and "access code" not in shown


def fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "base"])
def test_every_method_starts_as_the_base_model_and_can_be_switched_off(folder, name):
    base = logits_of(load(folder))
    make, options = methods.METHODS[name]
    if name == "lora_q_equal":
        options = {**options, "layers": [1, 2]}
    model = make(load(folder), options).eval()
    torch.testing.assert_close(logits_of(model), base, rtol=1e-4, atol=1e-5)
    fill(model)
    assert (logits_of(model) - base).abs().max() > 1e-3
    with methods.without_adapter(model):
        torch.testing.assert_close(logits_of(model), base, rtol=1e-4, atol=1e-5)
    assert (logits_of(model) - base).abs().max() > 1e-3


def test_a_temperature_scales_the_query(folder, monkeypatch):
    """All gates on an expert of temperature t: the model with queries t times as long."""
    monkeypatch.setitem(methods.EXPERTS, "hot", [(1.0, 1.0), (1.0, 1.7)])
    model = methods.mixture(load(folder), {"experts": "hot", "static": True}).eval()
    for name, parameter in model.named_parameters():
        if "head_logits" in name:
            parameter.data[:, 1] = 50.0
        elif "identity_scale" in name:
            parameter.data.fill_(1.0)
    expected = load(folder)
    for layer in expected.model.layers:
        layer.self_attn.q_proj.weight.data *= 1.7
    ids = token_ids(length=20)
    torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids), rtol=1e-3, atol=1e-4)


def test_static_gates_are_the_same_for_every_token(folder):
    model = fill(methods.mixture(load(folder), {"experts": "angles", "static": True}))
    layer = next(module for module in model.modules() if isinstance(module, methods.MoICELayer))
    router = layer.moice_router["default"]
    gates = router.gates(router(torch.randn(2, 4, 7, 16)), 5)
    assert torch.equal(gates, gates[:1, :, :1].expand_as(gates))
    assert not torch.equal(gates[0, 0, 0], gates[0, 1, 0])


def test_frozen_gates_are_the_means_of_the_trained_ones(folder):
    model = fill(methods.mixture(load(folder), {"experts": "angles"})).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ loop.index + 4 }} w{{ m.content | length % 50 + 9 }} {% endfor %}"
    )
    before = gates_along(model, token_ids()[0])
    frozen.freeze(model, tokenizer)
    after = gates_along(model, token_ids()[0])
    for name, gates in after.items():
        assert torch.equal(gates, gates[:, :1].expand_as(gates))
        assert not torch.equal(before[name], before[name][:, :1].expand_as(gates))
        torch.testing.assert_close(gates.sum(-1), torch.ones_like(gates[..., 0]))
