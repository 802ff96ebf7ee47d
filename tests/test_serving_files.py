"""What is said of a model before a server loads it; needs no server."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny_models import adapted_model, load, logits_of, save_tiny_model, token_ids
from transformers import AutoConfig, AutoTokenizer, Gemma3Config

from peft_moice import MoICEConfig, extend
from peft_moice.standalone.transformers_server import add_model_class, main
from peft_moice.standalone.vllm.folder import check_files, refuse_adapter
from peft_moice.standalone.vllm.refusals import refuse_other_classes, refuse_unserved

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    adapted_model(base).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(merged, tmp_path) -> Path:
    return shutil.copytree(merged, tmp_path / "copy")


@pytest.mark.slow
def test_importing_the_package_imports_no_server():
    code = "import sys, peft_moice, peft_moice.standalone.vllm.plugin; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.slow
def test_an_unmerged_adapter_is_refused_with_a_command_that_merges_it(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "both"))
    model = adapted_model(base)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"both holds a MoICE adapter beside a model.*Merge it with") as raised:
        refuse_adapter(folder)
    command = str(raised.value).split("    peft-moice ")[1].split("\nand serve")[0].split()
    subprocess.run([sys.executable, "-W", "ignore", "-m", "peft_moice", *command], check=True)
    check_files(tmp_path / "both-merged")
    assert torch.allclose(logits_of(load(str(tmp_path / "both-merged"))), logits_of(model), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "both-merged")("w5 w6").input_ids == [5, 6]


def test_other_adapters_are_none_of_our_business(tmp_path):
    refuse_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refuse_adapter(tmp_path)


def test_a_whole_folder_passes(merged, copied):
    config = AutoConfig.from_pretrained(merged)
    refuse_other_classes(config)
    refuse_unserved(config)
    check_files(merged)
    load(str(copied)).save_pretrained(copied, max_shard_size="20KB")
    assert len(list(copied.glob("*.safetensors"))) > 1
    check_files(copied)


def test_ropes_are_served_by_position_and_not_by_distance(base, tmp_path):
    beyond = {"query_positions": [8, None], "rope_type": "linear", "factor": 2.0}
    by_position = MoICEConfig(ropes=[{"query_positions": [0, 8]}, beyond], task_type="CAUSAL_LM")
    get_peft_model(load(base), by_position).merge_and_unload().save_pretrained(tmp_path / "position")
    refuse_unserved(AutoConfig.from_pretrained(tmp_path / "position"))
    extend(load(base)).merge_and_unload().save_pretrained(tmp_path / "distance")
    with pytest.raises(ValueError, match="not served by vLLM: it has ropes by the distance of keys"):
        refuse_unserved(AutoConfig.from_pretrained(tmp_path / "distance"))


def test_a_shard_that_is_missing(copied):
    load(str(copied)).save_pretrained(copied, max_shard_size="20KB")
    sorted(copied.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-.*copied in part"):
        check_files(copied)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_file_cut_anywhere(copied, kept):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was copied in part"):
        check_files(copied)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({}, "'routers' as a list, not None"),
        ({"routers": [], "layers": []}, r"'layers' as a dict, not \[\]"),
        ({"routers": [], "layers": {"model.layers.0.self_attn": {}}}, "'num_heads' as a int, not None"),
        ({"routers": [], "layers": {}}, r"`moice\.layers` of the config names no attention module"),
        (
            {"routers": [], "layers": {}, "angles": []},
            r"the fields \['angles'\], of which this .*knows nothing",
        ),
    ],
)
def test_a_description_that_says_nothing(merged, broken, reason):
    config = AutoConfig.from_pretrained(merged)
    config.moice = broken
    with pytest.raises((ValueError, TypeError), match=reason):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("architectures", "reason"),
    [(["MoICELlamaForTokenClassification"], "only causal"), (None, "not named"), ([], "not named")],
)
def test_other_classes_are_not_served(merged, architectures, reason):
    config = AutoConfig.from_pretrained(merged)
    config.architectures = architectures
    with pytest.raises(ValueError, match=f"is not served by vLLM: .*{reason}"):
        refuse_other_classes(config)


def test_a_model_of_images_and_text_is_not_served():
    """`AutoModelForCausalLM` makes them, too."""
    config = Gemma3Config(moice={"routers": [], "layers": {"model.language_model.layers.0.self_attn": {}}})
    with pytest.raises(ValueError, match="is not served by vLLM: it takes more than text"):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("layout", None, "'layout' as a dict, not None. Save the model anew"),
        ("layer_type", "sliding_attention", "layer_type 'sliding_attention', of which the model's rotary .* nothing"),
        ("query_ranges", [[0, 8]], r"the fields \['query_ranges'\], of which this version .*or a later one"),
    ],
)
def test_a_description_that_cannot_be_read(merged, field, value, reason):
    config = AutoConfig.from_pretrained(merged)
    config.moice["layers"]["model.layers.0.self_attn"][field] = value
    with pytest.raises((ValueError, TypeError), match=reason):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": LONGROPE}, "'longrope', whose angles change"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}, "mRoPE"),
        ({"kv_lora_rank": 8}, "latent"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"num_kv_shared_layers": 1}, "from other layers"),
    ],
)
def test_what_is_not_served(merged, changes, reason):
    config = AutoConfig.from_pretrained(merged)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"is not served by vLLM: .*{reason}"):
        refuse_unserved(config)


def test_transformers_own_server_finds_the_class(merged, monkeypatch):
    name = AutoConfig.from_pretrained(merged).architectures[0]
    assert not hasattr(transformers, name)
    try:
        add_model_class(str(merged))
        # What `transformers serve` does.
        model = getattr(transformers, name).from_pretrained(str(merged)).eval()
    finally:
        delattr(transformers, name)
    assert torch.equal(logits_of(model, token_ids()), logits_of(load(str(merged)), token_ids()))


def test_the_launcher_says_what_it_cannot_serve(base, tmp_path):
    with pytest.raises(SystemExit, match="usage"):
        main([])
    with pytest.raises(SystemExit, match=r"plain 'llama' model.*transformers serve"):
        main([base])
    PeftModel.save_pretrained(adapted_model(base), tmp_path)
    with pytest.raises(SystemExit, match="holds a MoICE adapter, and servers"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="absent"):
        main([str(tmp_path / "absent")])


@pytest.mark.parametrize("architectures", [None, ["MoICENobodysForCausalLM"]])
def test_the_launcher_needs_the_name_of_a_class(copied, architectures):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(SystemExit, match="as the model's class, of which transformers has no base"):
        main([str(copied)])
