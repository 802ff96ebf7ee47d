"""Attention backends and number formats: the mixture is the same whatever computes the attention."""

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from position_models import assert_close
from representatives import slow_but

from peft_moice import MoICEConfig

pytestmark = pytest.mark.usefixtures("no_grad")


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options):
    torch.manual_seed(1)
    model = tiny_model(family).to(dtype)
    model.set_attn_implementation(attention)
    config = MoICEConfig(base_multipliers=[1.0, 4.0, 0.25], top_k=2, init_weights=False, **options)
    return get_peft_model(model, config).eval()


def left_padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def real_logits(model) -> torch.Tensor:
    batch = left_padded()
    return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("other", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_backends_agree_and_can_be_changed_after_injection(family, other):
    model = adapted(family, attention="sdpa")
    expected = real_logits(model)
    assert_close(real_logits(adapted(family, attention=other)), expected)
    for attention in (other, "sdpa"):
        model.get_base_model().set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        assert_close(real_logits(model), expected)
    probs = model(**left_padded(), output_attentions=True).attentions
    assert probs is None or all(layer is None for layer in probs)
    model.get_base_model().set_attn_implementation("eager")
    assert all(layer is not None for layer in model(**left_padded(), output_attentions=True).attentions)


def test_eager_attention_returns_the_mixed_probabilities():
    model = adapted(attention="eager")
    reference = adapted(attention="eager", implementation="reference")
    batch = left_padded()
    for probs, expected in zip(
        model(**batch, output_attentions=True).attentions,
        reference(**batch, output_attentions=True).attentions,
        strict=True,
    ):
        assert probs.shape == (2, 4, 20, 20)
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 4, 20))
        torch.testing.assert_close(probs[1], expected[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(probs[0, :, 7:], expected[0, :, 7:], rtol=0, atol=1e-6)


def test_scores_with_a_soft_cap_are_mixed_after_the_cap():
    model = adapted("gemma2", attention="eager")
    reference = adapted("gemma2", attention="eager", implementation="reference")
    for layer in (*model.modules(), *reference.modules()):
        if hasattr(layer, "attn_logit_softcapping"):
            layer.attn_logit_softcapping = 0.5
    expected = reference(tokens()).logits
    assert_close(model(tokens()).logits, expected)
    assert (adapted("gemma2", attention="eager")(tokens()).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", slow_but(["auto"], ["auto", "delegated", "reference"]))
def test_attention_in_both_directions_stays_so(implementation):
    """PaliGemma's text tower says so in an attribute of its attention modules, and makes no mask."""
    ids = tokens(batch=1)
    changed = ids.clone()
    changed[0, -1] += 1
    model = adapted("paligemma", implementation=implementation)
    difference = (model(input_ids=ids).logits - model(input_ids=changed).logits)[0, 0].abs().max()
    assert difference > 1e-2
    expected = adapted("paligemma", implementation="delegated")(input_ids=ids).logits
    assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", slow_but(["sdpa"], ["eager", "sdpa"]))
def test_low_precision_costs_about_what_it_costs_the_base_model(dtype, attention):
    exact = adapted(attention=attention)
    low = adapted(dtype=dtype, attention=attention)
    low.load_state_dict(exact.state_dict())
    error = (low(tokens()).logits.float() - exact(tokens()).logits).abs().mean()
    assert low(tokens()).logits.dtype == dtype
    with exact.disable_adapter(), low.disable_adapter():
        own_error = (low(tokens()).logits.float() - exact(tokens()).logits).abs().mean()
    assert error < 2 * own_error


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.enable_grad()
def test_autocast_runs_forward_and_backward(attention):
    model = adapted(attention=attention)
    exact = model(tokens()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    error = (output.logits.float() - exact).abs().mean() / exact.abs().mean()
    assert 0 < error < 0.05
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "moice_" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
