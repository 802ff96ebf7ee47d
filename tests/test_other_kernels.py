"""Kernels that other packages put into a model: the mixture is the same, or they refuse clearly."""

import os

import pytest
import torch
from peft import PeftModel
from representatives import slow_but
from tiny_models import adapted_model, logits_of, save_tiny_model, token_ids
from transformers.models.llama import modeling_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def router_gradients(model: PeftModel) -> torch.Tensor:
    model.zero_grad()
    model(token_ids(), labels=token_ids()).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def complex_rotary(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding as a product of complex numbers."""
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[..., :half].float(), sin[..., :half].float()).unsqueeze(unsqueeze_dim)

    def rotated(x):
        product = torch.complex(x[..., :half].float(), x[..., half:].float()) * turn
        return torch.cat((product.real, product.imag), dim=-1).to(x.dtype)

    return rotated(q), rotated(k)


def liger_rotary(*args, **kwargs):
    """Liger's own, in Triton's interpreter."""
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    return liger.liger_rotary_pos_emb(*args, **kwargs)


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("rotary", [complex_rotary, pytest.param(liger_rotary, marks=[interpreted, pytest.mark.slow])])
def test_a_rotary_embedding_exchanged_in_the_modeling_file(folder, rotary, monkeypatch):
    """Liger exchanges `modeling_llama.apply_rotary_pos_emb`, before or after the adapter is injected."""
    before = adapted_model(folder)
    expected, expected_gradients = logits_of(before), router_gradients(before)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return rotary(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", counted)
    after = adapted_model(folder)
    # All layers in one run of the model, and each under two base angles.
    assert len(calls) == 3 + 2 * 3
    for model in (before, after):
        calls.clear()
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert len(calls) == 3
        tolerance = 1e-4 * expected_gradients.abs().max().item()
        torch.testing.assert_close(router_gradients(model), expected_gradients, rtol=0, atol=tolerance)
    assert torch.equal(after.generate(token_ids(), max_new_tokens=6), before.generate(token_ids(), max_new_tokens=6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(folder, cache):
    model = adapted_model(folder).to("cuda")
    ids = token_ids().to("cuda")
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    actual = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("implementation", ["auto", "delegated"])
@pytest.mark.parametrize("identity", slow_but([True], [False, True]))
def test_training_under_autocast(folder, implementation, identity):
    """Gradients in bfloat16 stay close to those in float32, whichever implementation computes them."""
    options = {"implementation": implementation, "init_weights": "identity" if identity else True}
    model = adapted_model(folder, **options).train()
    expected = router_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)
    actual = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
