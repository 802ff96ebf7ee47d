"""A sample of damaged and hostile files, and those that it, or thought, has found to do harm.

`CASES=2000 pytest tests/test_hostile_files.py -k sample --hypothesis-profile=many --hypothesis-seed=7` draws others;
with `--hypothesis-show-statistics` it counts what came of them.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hostile_files import SAVED, Case, Judge, cases
from hypothesis import HealthCheck, event, given, settings
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import layers_of, load, logits_of, save_tiny_model, wide_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_moice import MoICEConfig
from peft_moice.routing.spec import MAX_EXPERTS, RouterSpec

ROUTER = "base_model.model.model.layers.0.self_attn.moice_router"


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_a_sample(judge, case):
    event(f"{case.folder}: {judge(case)}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", ["adapter", "cat", "merged"])
def test_the_judge_sees_unchanged_files_and_changed_values(judge, folder):
    file, weights = ("config.json", "model") if folder == "merged" else ("adapter_config.json", "adapter_model")
    assert judge(Case(folder, file, (SAVED / folder / file).read_bytes(), "nothing")) == "the same values"
    content = bytearray((SAVED / folder / f"{weights}.safetensors").read_bytes())
    content[-2] ^= 1
    assert judge(Case(folder, f"{weights}.safetensors", bytes(content), "a bit")) == "loaded as written"


@pytest.fixture
def copy_of(tmp_path):
    """Makes a copy of one of tests/saved to be changed."""

    def copy(name: str) -> Path:
        shutil.copytree(SAVED / name, tmp_path / name)
        return tmp_path / name

    return copy


def change(file: Path, function) -> None:
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def refused_adapter(folder: Path, match: str, error=ValueError) -> None:
    base = load(SAVED / "base")
    expected = logits_of(base)
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(base, folder)
    assert not layers_of(base)
    assert torch.equal(logits_of(base), expected)


def refused_model(folder: Path, match: str, error=ValueError) -> None:
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


def test_more_experts_than_anyone_needs():
    many = [float(base) for base in range(1, MAX_EXPERTS + 2)]
    with pytest.raises(ValueError, match=f"more than {MAX_EXPERTS} angles"):
        MoICEConfig(rope_bases=many)
    assert MoICEConfig(rope_bases=many[:-1]).num_experts == MAX_EXPERTS


def test_routers_larger_than_their_attention_module(llama):
    model = load(llama)
    with pytest.raises(ValueError, match="Lower `router_dim`"):
        get_peft_model(model, wide_config(router_dim=2**16))
    assert not layers_of(model)
    get_peft_model(model, wide_config(router_dim=2**10))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_routers_that_are_not_finite(copy_of, value):
    adapter, merged = copy_of("adapter"), copy_of("merged")
    for file in (adapter / "adapter_model.safetensors", merged / "model.safetensors"):
        weights = load_file(file)
        name = next(name for name in weights if "moice" in name and name.endswith(("down_proj", "gate_proj")))
        weights[name].view(-1)[-1] = value
        save_file(weights, file, {"format": "pt"})
    refused_adapter(adapter, "not finite")
    refused_model(merged, "not finite")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_routers_of_odd_kinds(copy_of, dtype):
    folder = copy_of("adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    weights[f"{ROUTER}.down_proj"] = weights[f"{ROUTER}.down_proj"].to(dtype)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    refused_adapter(folder, f"stored as {dtype}")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_weights_that_cannot_be_read_leave_the_base_model_alone(copy_of, file):
    folder = copy_of("adapter")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    (folder / file).write_bytes(content[:-100])
    refused_adapter(folder, ".", Exception)


def test_a_pickle_is_not_run(copy_of, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    folder = copy_of("adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Evil()}, folder / "adapter_model.bin")
    refused_adapter(folder, "weights_only", pickle.UnpicklingError)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "part", ["model.layers.1.mlp.up_proj", "self_attn.moice_routers.0.up_proj", "model.embed_tokens", "model.norm"]
)
def test_a_merged_model_that_lacks_weights(copy_of, part):
    folder = copy_of("merged")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if part not in k}, folder / "model.safetensors", {"format": "pt"})
    refused_model(folder, f"lack the weight '.*{part}")


def test_a_decoder_without_layers_under_another_head(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    get_peft_model(load(base), wide_config()).merge_and_unload().save_pretrained(tmp_path / "merged")
    read = AutoModelForSequenceClassification.from_pretrained
    read(tmp_path / "merged")  # makes a new head
    file = tmp_path / "merged" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack the weight 'model\.layers\.1\.mlp"):
        read(tmp_path / "merged")


@pytest.mark.parametrize(
    ("change_layer", "match"),
    [
        (lambda layer: layer.update(num_heads=2**40), "num_heads"),
        (lambda layer: layer.update(num_heads="4"), "num_heads"),
        (lambda layer: layer.update(routers=[[5, 1.0]]), "names the router"),
        (lambda layer: layer.update(routers=[[-1, 1.0]]), "names the router"),
        (lambda layer: layer.update(routers=[]), "names no routers"),
        (lambda layer: layer.update(routers=[[0, float("nan")]]), "weight"),
        (lambda layer: layer.update(direction=0), "direction"),
        (lambda layer: layer.update(layer_type=["x"]), "layer_type"),
        (lambda layer: layer.update(layer_type="x"), "rotary embedding knows nothing"),
        (lambda layer: layer["layout"].update(size=7), "rotates 7 dimensions"),
        (lambda layer: layer["layout"].update(start=2**40), "dimensions from"),
        (lambda layer: layer.pop("layout"), "layout"),
    ],
)
def test_descriptions_that_describe_nothing(copy_of, change_layer, match):
    folder = copy_of("merged")
    change(folder / "config.json", lambda config: change_layer(next(iter(config["moice"]["layers"].values()))))
    refused_model(folder, match, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("change_all", "match"),
    [
        (lambda moice: moice["routers"][0].update(router_dim=10**9), r"routers of [\d,]{13,} weights"),
        (lambda moice: moice["layers"].update({"../etc/passwd": moice["layers"].popitem()[1]}), "'../etc/passwd'"),
    ],
)
def test_descriptions_of_huge_routers_and_of_paths(copy_of, change_all, match):
    folder = copy_of("merged")
    change(folder / "config.json", lambda config: change_all(config["moice"]))
    refused_model(folder, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"router_dim": 10**9}, r"routers of [\d,]{13,} weights.*router_dim"),
        ({"router_dim": 10**9, "router_scope": "head"}, r"routers of [\d,]{13,} weights.*router_dim"),
        ({"trainable_token_indices": [64]}, "holds 64, but 'model.embed_tokens' has the tokens 0 to 63"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "holds -1"),
        ({"trainable_token_indices": []}, "names no token"),
        ({"trainable_token_indices": [[1, 2]]}, "has to be a list of integers"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "has to be a list of integers"),
        ({"trainable_token_indices": {"self_attn": [1]}}, "has no embeddings of tokens"),
        ({"trainable_token_indices": [3]}, r"lacks the weight 'model\.embed_tokens\..*trainable_token_indices"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "Leave it out of one of them"),
        ({"modules_to_save": ["lm_head"]}, r"lacks the weight 'lm_head\.weight'.*modules_to_save"),
        ({"modules_to_save": ["ayers.0"]}, "which means the adapted attention module"),
        ({"target_modules": "("}, "`target_modules` is no regular expression"),
        ({"exclude_modules": "("}, "`exclude_modules` is no regular expression"),
        ({"layers_to_transform": [0], "layers_pattern": ["layers", "("]}, "`layers_pattern` is no regular expression"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "`layers_pattern` has to be one name or a list"),
    ],
)
def test_fields_of_an_adapter_that_cannot_be(copy_of, fields, match):
    folder = copy_of("adapter")
    change(folder / "adapter_config.json", lambda config: config.update(fields))
    refused_adapter(folder, match, (ValueError, TypeError))


FIELDS = {"rope_bases": [1e4, 2e4], "top_k": 1, "router_dim": 2, "router_scope": "layer", "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (None, TypeError),
        ([1], TypeError),
        ({}, ValueError),
        ({**FIELDS, "top_k": None}, ValueError),
        ({**FIELDS, "top_k": 3}, ValueError),
        ({**FIELDS, "router_dim": "2"}, TypeError),
        ({**FIELDS, "hidden_act": "__import__"}, ValueError),
        ({**FIELDS, "unknown": 1}, ValueError),
        ({**FIELDS, "weight": 10**400}, ValueError),
        ({**FIELDS, "weight": 0}, ValueError),
        ({**FIELDS, "identity": 1}, ValueError),
        ({**FIELDS, "router_aux_loss_coef": float("inf")}, ValueError),
        ({**FIELDS, "rope_bases": [1e4, 10**400]}, ValueError),
    ],
)
def test_routers_that_no_file_should_describe(fields, error):
    with pytest.raises(error, match="here"):
        RouterSpec.from_saved(fields, "here")
    with pytest.raises(error, match="members"):
        MoICEConfig(rope_bases=[1e4, 2e4], top_k=1, members=[fields])


def test_errors_quote_huge_values_in_part():
    with pytest.raises(ValueError, match="hidden_act") as error:
        MoICEConfig(hidden_act="x" * 10**6)
    assert len(str(error.value)) < 2000
    with pytest.raises(TypeError, match="modules_to_save"):
        MoICEConfig(modules_to_save=[None])
