"""Folders of merged models in the hands of others: the stub, the tokenizer, and what is left of an earlier model."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import adapted_model, load, logits_of, save_tiny_model, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from peft_moice.standalone import saving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SAVED = Path(__file__).parent / "saved"


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "peft_moice":
            raise ModuleNotFoundError("No module named 'peft_moice'", name="peft_moice")

sys.meta_path.insert(0, Hidden())
"""


def run(code: str, home: Path, *, package: bool = True) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process without a terminal; without `package`, peft_moice cannot be imported there."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", ("" if package else HIDDEN) + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture
def merged(llama):
    return adapted_model(llama).merge_and_unload()


@pytest.fixture
def folder(merged, tmp_path) -> Path:
    merged.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_a_fresh_process_reads_it_with_trust_or_with_the_import(merged, folder, tmp_path):
    torch.save({"ids": token_ids(), "logits": logits_of(merged)}, tmp_path / "expected.pt")
    check = f"""
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        with torch.no_grad():
            assert torch.equal(model.eval()(expected["ids"]).logits, expected["logits"])
        print(type(model).__name__)
    """
    head = "import sys, torch\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline\n"
    read = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}"

    trusting = run(
        head
        + f"model = {read}, trust_remote_code=True)\n"
        + textwrap.dedent(check)
        + f"generate = pipeline('text-generation', model={str(folder)!r}, trust_remote_code=True)\n"
        + "assert generate('w3 w4', max_new_tokens=2, do_sample=False)[0]['generated_text']\n"
        # As HELMET does: a config read before, and generation that goes on from a prompt read by the inner model.
        + f"config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        + f"again = {read}, config=config, dtype=torch.float32, device_map='auto', trust_remote_code=True)\n"
        + "ids, mask = expected['ids'][:1], torch.ones_like(expected['ids'][:1])\n"
        + "cache = again.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values\n"
        + "written = [m.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, **options)\n"
        + "           for m, options in ((again, {'past_key_values': cache}), (model, {}))]\n"
        + "assert torch.equal(*written)\n",
        tmp_path / "home",
    )
    assert trusting.returncode == 0, trusting.stderr[-2000:]
    assert trusting.stdout.split()[-1] == "MoICELlamaForCausalLM"

    importing = run(
        f"import peft_moice\n{head}model = {read})\n"
        + textwrap.dedent(check)
        + "assert not any('configuration_moice' in name for name in sys.modules)\n",
        tmp_path / "home",
    )
    assert importing.returncode == 0, importing.stderr[-2000:]

    careful = run(head + f"{read})", tmp_path / "home")
    assert careful.returncode != 0
    assert "`trust_remote_code=True`" in careful.stderr.splitlines()[-1]

    lacking = run(head + f"{read}, trust_remote_code=True)", tmp_path / "home", package=False)
    assert lacking.returncode != 0
    assert "pip install peft_moice" in lacking.stderr.splitlines()[-1]


@pytest.mark.parametrize("trust", [None, True, False])
def test_no_code_from_the_folder_runs_where_the_package_is_imported(folder, tmp_path, merged, trust):
    canary = tmp_path / "executed"
    evil = (
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\nfrom peft_moice.standalone import MoICEAutoConfig\n"
    )
    (folder / "configuration_moice.py").write_text(evil)
    config = json.loads((folder / "config.json").read_text())
    for auto_class in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        config["auto_map"][auto_class] = "configuration_moice.MoICEAutoConfig"
    (folder / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    AutoModel.from_pretrained(folder, trust_remote_code=trust)
    assert torch.equal(logits_of(again), logits_of(merged))
    assert not canary.exists()
    # Nor does it travel on.
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_moice.MoICEAutoConfig"
    }
    stub = (tmp_path / "again" / "configuration_moice.py").read_text()
    assert stub == Path(saving.__file__).with_name("configuration_moice.py").read_text()


def test_the_tokenizer_comes_along_where_it_is_at_hand(llama, folder, tmp_path):
    text = "w3 w9 w4"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(llama)(text)
    # One that is in the folder already is not touched.
    other = AutoTokenizer.from_pretrained(llama, pad_token="w9")
    other.save_pretrained(folder)
    load(folder).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "w9"


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path):
    base = Path(save_tiny_model(tmp_path / "base"))
    for file in base.glob("tokenizer*"):
        file.unlink()
    adapted_model(str(base)).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("tokenizer*"))


def test_weights_of_an_earlier_save_do_not_stay(merged, folder):
    first = logits_of(merged)
    merged.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    changed = logits_of(merged)
    assert not torch.equal(first, changed)
    merged.save_pretrained(folder, max_shard_size="20kB")
    assert torch.equal(logits_of(load(folder)), changed)
    assert not (folder / "model.safetensors").exists()
    merged.model.layers[0].mlp.up_proj.weight.data.div_(2)
    (folder / "notes.txt").write_text("mine")
    merged.save_pretrained(folder)
    assert torch.equal(logits_of(load(folder)), first)
    assert len(list(folder.glob("model*"))) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_of_version_0_1_becomes_one_of_this_version(tmp_path):
    old = load(SAVED / "merged")
    old.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(old))
    assert (tmp_path / "configuration_moice.py").exists()


def test_files_have_the_mode_of_any_new_file(folder):
    (folder / "plain").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "plain").stat().st_mode}


def test_the_card_of_a_merged_model(merged, folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "import peft_moice" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "| 10000, 2500, 5000, 40000 (1, 0.25, 0.5, 4 times the first) |" in card
    assert "library_name: transformers\n" in card
    # What people add stays, and the part about the routers is there once.
    (folder / "README.md").write_text(card + "\n## Evaluation\n\nMeasured by hand.\n")
    merged.save_pretrained(folder)
    again = (folder / "README.md").read_text()
    assert again == card + "\n## Evaluation\n\nMeasured by hand.\n"
