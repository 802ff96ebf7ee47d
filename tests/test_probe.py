"""What the probe finds, leaves out and refuses: it tells layouts apart in every dtype, and leaves no trace."""

import pytest
import torch
from families import tiny_model, tokens
from peft import LoraConfig, get_peft_model
from representatives import slow_but
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from versions import family

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.probing import LayerProbe, UnsupportedLayerError, attention_module_names
from peft_moice.probing.layouts import Capture, best_layout
from peft_moice.rope import RotaryLayout, rotate


def config(**options) -> MoICEConfig:
    return MoICEConfig(**{"base_multipliers": [1.0, 4.0, 0.25], "init_weights": False, **options})


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MoICELayer)]


def plans(model: nn.Module) -> list:
    probe = LayerProbe(model)
    return [probe.plan(name) for name in attention_module_names(model)]


@pytest.mark.parametrize(
    "family, layout, direction",
    [
        ("llama", RotaryLayout(0, 16, interleaved=False), 1),
        ("cohere", RotaryLayout(0, 16, interleaved=True), 1),
        ("stablelm", RotaryLayout(0, 4, interleaved=False), 1),
        ("glm4", RotaryLayout(0, 8, interleaved=True), 1),
        ("gpt_oss", RotaryLayout(0, 16, interleaved=False), 1),
        ("deepseek_v2", RotaryLayout(16, 8, interleaved=True), 1),
        ("deepseek_v3", RotaryLayout(16, 8, interleaved=False), 1),
        ("nanochat", RotaryLayout(0, 16, interleaved=False), -1),
    ],
)
def test_layouts(family, layout, direction):
    for plan in plans(tiny_model(family)):
        assert plan.rope.layout == layout
        assert plan.rope.direction == direction


@pytest.mark.parametrize(
    "family, overrides, rotary",
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, [True, False]),
        ("llama4_text", {"no_rope_layers": [0, 1]}, [False, True]),
        ("cohere2", {"layer_types": ["sliding_attention", "full_attention"]}, [True, False]),
        ("exaone4", {"layer_types": ["full_attention", "sliding_attention"]}, [False, True]),
        ("granite_swa", {"layer_rope_theta": [0.0, 10000.0]}, [False, True]),
        ("granitemoe_swa", {"layer_rope_theta": [10000.0, 0.0]}, [True, False]),
        family("beam", {}, None),
        family("muse_glimmer", {}, None),
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_layers_without_rotary_embedding_are_left_out(family, overrides, rotary):
    found = [plan.rope is not None for plan in plans(tiny_model(family, **overrides))]
    if rotary is None:
        assert any(found) and not all(found)
    else:
        assert found == rotary
    model = tiny_model(family, **overrides)
    base = model(input_ids=tokens()).logits
    model = get_peft_model(model, config(base_multipliers=[1.0]))
    assert len(adapted_names(model)) == sum(found)
    assert torch.equal(model(input_ids=tokens()).logits, base)


@pytest.mark.parametrize(
    "family", slow_but(["olmo3"], ["gemma3_text", "olmo3", "modernbert-decoder", "mimo_v2_flash", "gemma4_text"])
)
def test_layer_types_have_angles_of_their_own(family):
    model = get_peft_model(tiny_model(family), config(base_multipliers=[1.0, 2.0]))
    rope_bases = model.peft_config["default"].rope_bases
    parameters = model.config.rope_parameters
    assert rope_bases == {
        kind: pytest.approx([parameters[kind]["rope_theta"], 2 * parameters[kind]["rope_theta"]])
        for kind in rope_bases
    }
    assert len(rope_bases) == 2


@pytest.mark.parametrize(
    "family, reason",
    [
        ("hunyuan_v1_dense", "something other than a rotation acts on them"),
        ("hunyuan_v1_moe", "something other than a rotation acts on them"),
        ("deepseek_v32", "it selects keys itself .`indices`."),
        ("deepseek_v4", "no rope parameters for layers of type"),
        ("falcon", "FalconAttention.* do not go through transformers' attention interface"),
        ("gptj", "do not go through transformers' attention interface|no rotary embedding that computes them from a"),
        ("codegen", "do not go through transformers' attention interface|no rotary embedding that computes them from"),
        ("roformer", "do not go through transformers' attention interface"),
        ("gpt2", "none of its attention modules has a rotary embedding"),
        ("gpt_neox_japanese", "do not go through transformers' attention interface"),
        ("opt", "none of its attention modules has a rotary embedding"),
        ("bert", "none of its attention modules has a rotary embedding"),
        ("nemotron_h", "none of its attention modules has a rotary embedding"),
        ("mamba", "no attention modules"),
    ],
)
def test_families_that_cannot_be_adapted_are_refused_with_the_reason(family, reason):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=reason) as error:
        get_peft_model(model, config())
    assert "target_modules" in str(error.value)
    assert not adapted_names(model)


def test_a_weighted_norm_after_the_rotation_is_refused_even_while_its_weights_are_equal():
    model = tiny_model("hunyuan_v1_dense")
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            nn.init.ones_(parameter)
    with pytest.raises(UnsupportedLayerError, match="something other than a rotation"):
        get_peft_model(model, config())


LONGER = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", **LONGER},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONGER},
        {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
@pytest.mark.slow
@torch.no_grad()
def test_rope_types_keep_their_parameters_under_every_angle(rope_parameters):
    rope_parameters = {"rope_theta": 10000.0, **rope_parameters}
    expected = tiny_model("llama", rope_parameters=dict(rope_parameters), theta_factor=3.0)(tokens()).logits
    model = tiny_model("llama", rope_parameters=dict(rope_parameters))
    plain = tiny_model("llama", rope_parameters={"rope_theta": 10000.0}, theta_factor=3.0)(tokens()).logits
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()
    actual = get_peft_model(model, config(base_multipliers=[3.0]))(tokens()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "family",
    slow_but(["gemma3"], ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "mistral3", "internvl", "lfm2_vl"]),
)
@torch.no_grad()
def test_vision_language_models_are_adapted_in_their_text_tower_alone(family):
    model = tiny_model(family)
    base = model(input_ids=tokens()).logits
    decoder = {id(module) for module in model.get_decoder().modules()}
    model = get_peft_model(model, config())
    names = adapted_names(model)
    assert names and all(id(model.get_submodule(name).base_layer) in decoder for name in names)
    assert (model(input_ids=tokens()).logits - base).abs().max() > 1e-4 * base.abs().max()

    turned = get_peft_model(tiny_model(family), config(base_multipliers=[3.0]))
    expected = tiny_model(family, theta_factor=3.0)(input_ids=tokens()).logits
    actual = turned(input_ids=tokens()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_cross_attention_is_not_wrapped():
    model = get_peft_model(tiny_model("mllama", cross_attention_layers=[1], num_hidden_layers=3), config())
    assert [name.split(".")[-2] for name in adapted_names(model)] == ["0", "2"]
    model = get_peft_model(tiny_model("idefics"), config())
    assert {name.split(".")[-1] for name in adapted_names(model)} == {"self_attn"}


def test_probing_leaves_the_model_as_it_was():
    model = tiny_model("gemma4_text")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    plans(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(model.get_submodule(name).config is config for name, config in configs.items())


def test_a_model_without_weights_is_probed_like_one_with_them():
    expected = [(plan.rope.layout, plan.num_heads, plan.head_dim) for plan in plans(tiny_model("deepseek_v3"))]
    with torch.device("meta"):
        model = tiny_model("deepseek_v3")
    found = plans(model)
    assert [(plan.rope.layout, plan.num_heads, plan.head_dim) for plan in found] == expected
    assert all(parameter.is_meta for parameter in model.parameters())


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
    found = plans(model.base_model.model)
    assert [plan.rope.layout for plan in found] == 2 * [RotaryLayout(0, 16, interleaved=False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    model = get_peft_model(model, MoICEConfig())
    assert sum(isinstance(module, MoICELayer) for module in model.modules()) == 2


def test_autocast_does_not_reach_the_probe():
    model = tiny_model("cohere")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(plan.rope.layout == RotaryLayout(0, 16, interleaved=True) for plan in plans(model))
