"""A longer window from the command line to a merged folder: written, loaded, described, merged."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny_models import decide, load, logits_of, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_moice import MoICEConfig, check, extend
from peft_moice.cli.main import main
from peft_moice.tuner.extending import extension_config

WINDOW = 32
IDS = token_ids(2, 100)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"), max_position_embeddings=WINDOW)


@pytest.fixture(scope="module")
def expected(base) -> torch.Tensor:
    return logits_of(extend(load(base), 4.0).eval(), IDS)


def test_the_command_writes_what_extend_adds(base, expected, tmp_path, capsys):
    assert main(["extend", base, str(tmp_path), "--factor", "4"]) == 0
    said = capsys.readouterr().out
    assert f"from {WINDOW} to {4 * WINDOW} tokens" in said
    assert "queries below 32: the model's own rope" in said
    assert "keys nearer than 24, linear factor 13.0 beyond" in said
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, IDS), expected)
    assert "linear factor 13.0 beyond" in (tmp_path / "README.md").read_text()
    assert main(["info", str(tmp_path)]) == 0
    assert "linear factor 13.0 beyond" in capsys.readouterr().out


def test_an_adapter_without_parameters_is_saved_and_loaded(base, expected, tmp_path):
    extend(load(base), 4.0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["ropes"] == extension_config(load(base).config, 4.0).ropes
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, IDS), expected)


def test_a_merged_folder_states_the_new_length_and_computes_the_same(base, expected, tmp_path):
    merged = extend(load(base), 4.0).eval().merge_and_unload()
    assert torch.equal(logits_of(merged, IDS), expected)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.max_position_embeddings == 4 * WINDOW
    assert torch.equal(logits_of(loaded, IDS), expected)
    with pytest.raises(ValueError, match="peft_moice"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_by_position_all_keys_have_the_angles_of_yarn(base, tmp_path, capsys):
    """As under the same rule without the length that it starts from; merging states another length."""
    rules = [
        {"query_positions": [0, WINDOW]},
        {"query_positions": [WINDOW, 4 * WINDOW], "rope_type": "yarn", "factor": 4.0},
    ]
    before = logits_of(get_peft_model(load(base), MoICEConfig(ropes=rules)).eval(), IDS)
    assert main(["extend", base, str(tmp_path / "adapter"), "--factor", "4", "--by", "position"]) == 0
    assert "queries from 32 on below 128: yarn factor 4.0" in capsys.readouterr().out
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits_of(model, IDS), before)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), IDS), before)


def test_positions_may_jump_over_a_rope(base):
    ends = [0, 40, 60, None]
    far = [{}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}]
    rules = [{"query_positions": [ends[i], ends[i + 1]], **rope} for i, rope in enumerate(far)]
    ids = {"input_ids": IDS[:, :20], "position_ids": torch.cat((torch.arange(10), torch.arange(70, 80)))[None]}
    found = []
    for implementation in ("reference", "delegated"):
        model = get_peft_model(load(base), MoICEConfig(ropes=rules, implementation=implementation)).eval()
        found.append(model(**ids, use_cache=False).logits.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_check_looks_beyond_the_window(base, monkeypatch):
    model = extend(load(base), 4.0)
    assert len(check(model)) == model.config.num_hidden_layers
    own = type(model.model.model.layers[0].self_attn.base_layer)
    # As an upgrade might do that does not ask for the attention function any more.
    monkeypatch.setattr(own, "forward", lambda self, hidden_states, *args, **kwargs: (hidden_states, None))
    with pytest.raises(RuntimeError, match="did not ask for its mixture"):
        check(model)


def test_routers_and_an_extension_are_merged_together(base, tmp_path):
    model = get_peft_model(load(base), wide_config()).eval()
    decide(model)
    within = logits_of(model, IDS[:, :WINDOW])
    model = extend(model, 4.0).eval()
    assert torch.equal(logits_of(model, IDS[:, :WINDOW]), within)
    before = logits_of(model, IDS)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, IDS), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"factor": 1.0}, "`factor` is 1.0"),
        ({"factor": float("nan")}, "`factor` is nan"),
        ({"factor": 4.0, "near": WINDOW}, "`near` is 32"),
        ({"factor": 4.0, "near": 0}, "`near` is 0"),
        ({"factor": 4.0, "near": 8, "by": "position"}, "`near` is 8, a distance"),
        ({"factor": 4.0, "by": "time"}, "`by` is 'time'"),
    ],
)
def test_values_out_of_range(base, options, reason):
    with pytest.raises(ValueError, match=reason):
        extend(load(base), **options)


def test_a_rope_for_longer_texts_is_not_extended_by_itself(base):
    config = load(base).config
    config.rope_parameters = {**config.rope_parameters, "rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ValueError, match=r"own rope is \['yarn'\]"):
        extension_config(config, 4.0)


def test_ropes_and_routers_are_two_adapters():
    with pytest.raises(ValueError, match="Make two adapters"):
        MoICEConfig(ropes=[{}], base_multipliers=[1.0, 2.0])
