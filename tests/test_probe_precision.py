"""The probe tells layouts apart in every dtype, takes rotations alone for rotations, and leaves no trace."""

import pytest
import torch
from families import tiny_model, tokens
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.probing import LayerProbe, UnsupportedLayerError, attention_module_names
from peft_moice.probing.layouts import Capture, best_layout
from peft_moice.rope import RotaryLayout, rotate


def plans(model: torch.nn.Module) -> list:
    probe = LayerProbe(model)
    return [probe.plan(name) for name in attention_module_names(model)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_coordinates_beside_the_rotated_ones_hide_no_wrong_layout(dtype):
    """As in trained models, some of whose queries and keys are hundreds of times as large as the others."""
    model = tiny_model("glm")
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.unflatten(0, (-1, 16))[:, 8:] *= 300
    for plan in plans(model.to(dtype)):
        assert plan.rope.layout == RotaryLayout(0, 8, interleaved=True)


class NearlyRotary(LlamaRotaryEmbedding):
    """Cosines and sines that are off by a part of themselves that depends on the angle."""

    off_by = 1e-4

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos * (1 + self.off_by * cos), sin * (1 + self.off_by * cos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_nearly_a_rotation_is_refused(dtype):
    model = tiny_model("llama").to(dtype)
    model.model.rotary_emb = NearlyRotary(model.config)
    with pytest.raises(UnsupportedLayerError, match="something other than a rotation"):
        get_peft_model(model, MoICEConfig())


def capture_of(layout: RotaryLayout, deltas: torch.Tensor, dtype: torch.dtype) -> Capture:
    """Queries and keys that were rotated by `deltas` in `layout`."""
    positions = (0, 1, 3, 8, 20, 50)
    own = torch.randn(1, 2, len(positions), 16, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * deltas
    turned = rotate(own, angles.cos().float(), angles.sin().float(), layout)
    return Capture(positions, [(own.to(dtype), turned.to(dtype))])


@pytest.mark.parametrize("layout", [RotaryLayout(0, 8, True), RotaryLayout(8, 8, False), RotaryLayout(0, 8, False)])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_all_layouts_is_taken(layout, direction, dtype):
    deltas = torch.tensor([0.0, 0.3, -0.1, 0.05], dtype=torch.float64)
    assert best_layout(capture_of(layout, direction * deltas, dtype), deltas) == (layout, direction)


def test_layouts_that_explain_equally_well_are_no_proof():
    """Angles too small for the precision of quantized layers fit every layout."""
    deltas = torch.tensor([0.0, 3e-4, 2e-4, 1e-4], dtype=torch.float64)
    layout = RotaryLayout(0, 8, True)
    assert best_layout(capture_of(layout, deltas, torch.bfloat16), deltas) is None
    assert best_layout(capture_of(layout, deltas, torch.float32), deltas) == (layout, 1)


@torch.no_grad()
def test_a_float64_model():
    expected = tiny_model("llama", theta_factor=3.0).double()(tokens()).logits
    model = get_peft_model(tiny_model("llama").double(), MoICEConfig(base_multipliers=[3.0])).eval()
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_dropout_of_lora_in_training_mode():
    options = {"target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": False}
    model = get_peft_model(tiny_model("llama"), LoraConfig(**options))
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    probe = LayerProbe(model.base_model.model)
    names = attention_module_names(model.base_model.model)
    assert [probe.plan(name).rope.layout for name in names] == 2 * [RotaryLayout(0, 16, interleaved=False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    model = get_peft_model(model, MoICEConfig())
    assert sum(isinstance(module, MoICELayer) for module in model.modules()) == 2


def test_autocast_does_not_reach_the_probe():
    model = tiny_model("cohere")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(plan.rope.layout == RotaryLayout(0, 16, interleaved=True) for plan in plans(model))
