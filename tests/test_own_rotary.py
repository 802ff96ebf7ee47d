"""The frequencies of the model's own rotary embedding are what MoICE goes on from, before and after injection."""

import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRotaryEmbedding

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.probing import LayerProbe, attention_module_names

pytestmark = pytest.mark.usefixtures("no_grad")

WIDE = {"base_multipliers": [1.0, 4.0, 0.25], "init_weights": False}


def llama(**options) -> nn.Module:
    return tiny_model("llama", **options)


def edit_frequencies(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq *= 0.5


def edit_the_config(model: nn.Module) -> None:
    model.config.rope_parameters["rope_theta"] *= 4


def exchange_the_rotary_embedding(model: nn.Module) -> None:
    other = copy.deepcopy(model.config)
    other.rope_parameters["rope_theta"] *= 4
    rotary = LlamaRotaryEmbedding(other)
    rotary.config = model.config
    model.model.rotary_emb = rotary


@pytest.mark.parametrize("change", [edit_frequencies, edit_the_config, exchange_the_rotary_embedding])
def test_frequencies_that_the_config_does_not_give_are_refused(change):
    model = llama()
    change(model)
    with pytest.raises(ValueError, match=r"rotates by the inverse frequencies .*rope_parameters"):
        get_peft_model(model, MoICEConfig(**WIDE))
    assert not any(isinstance(module, MoICELayer) for module in model.modules())


@pytest.mark.parametrize("change", [edit_frequencies, exchange_the_rotary_embedding])
@pytest.mark.parametrize("when", ["before the first pass", "later"])
def test_a_change_after_injection_is_refused_until_it_is_undone(change, when):
    base = llama()
    model = get_peft_model(base, MoICEConfig(**WIDE)).eval()
    expected = copy.deepcopy(model)(tokens()).logits
    if when == "later":
        model(tokens())
    own = copy.deepcopy(base.model.rotary_emb)
    change(base)
    with pytest.raises(ValueError, match="rotary embedding has changed since its adapter was added"):
        model(tokens())
    base.model.rotary_emb = own
    assert torch.equal(model(tokens()).logits, expected)


def test_a_change_after_merging_or_reloading_is_refused(tmp_path):
    merged = get_peft_model(llama(), MoICEConfig(**WIDE)).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    for model in (merged, AutoModelForCausalLM.from_pretrained(tmp_path)):
        model(tokens())
        edit_frequencies(model)
        with pytest.raises(ValueError, match="rotary embedding has changed"):
            model(tokens())


def test_copies_watch_their_own_rotary_embedding():
    model = get_peft_model(llama(), MoICEConfig(**WIDE)).eval()
    expected = model(tokens()).logits
    other = copy.deepcopy(model)
    edit_frequencies(other.base_model.model)
    assert torch.equal(model(tokens()).logits, expected)
    with pytest.raises(ValueError, match="rotary embedding has changed"):
        other(tokens())
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()).logits, expected)


def test_a_second_adapter_on_an_edited_config_is_refused():
    base = llama()
    model = get_peft_model(base, MoICEConfig(**WIDE))
    edit_the_config(base)
    with pytest.raises(ValueError, match="config of the model's rotary embedding was changed"):
        model.add_adapter("second", MoICEConfig(**WIDE))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_of_the_buffer_is_no_change(dtype):
    before = get_peft_model(llama().to(dtype), MoICEConfig(**WIDE)).eval()
    after = get_peft_model(llama(), MoICEConfig(**WIDE)).eval()
    assert after(tokens()).logits.isfinite().all()
    after.get_base_model().to(dtype)
    for model in (before, after):
        assert model.get_base_model().model.rotary_emb.inv_freq.dtype == dtype
        assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_types_that_overwrite_their_frequencies_are_no_change(rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    if rope_type == "longrope":
        parameters |= {"short_factor": 8 * [1.0], "long_factor": 8 * [3.0]}
    base = llama(rope_parameters=parameters, max_position_embeddings=16)
    short = tokens(length=8)
    model = get_peft_model(copy.deepcopy(base), MoICEConfig(**WIDE)).eval()
    expected = model(short, use_cache=False).logits
    with model.disable_adapter():
        model(tokens(length=40), use_cache=False)
        used = base(tokens(length=40), use_cache=False).logits
    assert used.isfinite().all()
    assert torch.equal(model(short, use_cache=False).logits, expected)
    assert LayerProbe(base).plan(attention_module_names(base)[0]).rope is not None


class ShiftsEmbeddings(LlamaDecoderLayer):
    """Gives its attention the position embeddings of other positions than it says."""

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        position_embeddings = tuple(part.roll(1, dims=1) for part in position_embeddings)
        return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)


def test_position_embeddings_that_the_model_alters_are_refused():
    model = llama()
    model.model.layers[1].__class__ = ShiftsEmbeddings
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*other position embeddings than `rotary_emb`"):
        get_peft_model(model, MoICEConfig(**WIDE))
    adapted = get_peft_model(model, MoICEConfig(**WIDE, exclude_modules=["layers.1.self_attn"]))
    assert [name for name, module in adapted.named_modules() if isinstance(module, MoICELayer)] == [
        "base_model.model.model.layers.0.self_attn"
    ]


class HalvesPositions(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        positions = 0.5 * torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return super().forward(input_ids, attention_mask, positions, **kwargs)


def test_positions_between_integers_are_refused():
    model = llama()
    model.model.__class__ = HalvesPositions
    with pytest.raises(ValueError, match=r"not integers: \[0\.0, 0\.5, 1\.0\]"):
        get_peft_model(model, MoICEConfig(**WIDE))
