"""`python -m peft_moice lm_eval`: EleutherAI's harness, where it is installed, measures adapters and merged folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import adapted_model, load, save_tiny_model

from peft_moice.cli.main import main

CONTEXT = " ".join(f"w{i * i % 50 + 3}" for i in range(60))
CHOICES = ("w9 w4 w40", "w14 w5")
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: 0
"""


def log_likelihoods(model: torch.nn.Module) -> list[float]:
    found = []
    for choice in CHOICES:
        ids = torch.tensor([[int(word[1:]) for word in f"{CONTEXT} {choice}".split()]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        each = log_probs.gather(1, ids[0, 1:, None])
        found.append(each[-len(choice.split()) :].sum().item())
    return found


def measured(folder: Path, module: str, model_args: str) -> list[float]:
    """What the harness, run as `python -m`, finds for each choice."""
    data, out = folder / "data.jsonl", folder / "out"
    data.write_text(json.dumps({"context": CONTEXT, "choices": CHOICES}))
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "tiny.yaml").write_text(TASK.replace("DATA", str(data)))
    words = f"--model hf --model_args dtype=float32,{model_args} --tasks tiny --include_path {folder / 'tasks'}"
    words += f" --device cpu --log_samples --output_path {out}"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *module.split(), *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|tiny" in done.stdout
    (samples,) = out.glob("**/samples_tiny_*.jsonl")
    found = [float(response[0]) for response in json.loads(samples.read_text())["filtered_resps"]]
    samples.unlink()
    return found


@pytest.mark.slow
def test_the_harness_measures_what_the_adapted_model_says(tmp_path):
    pytest.importorskip("lm_eval")
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    save_tiny_model(tmp_path / "base")
    model = adapted_model(base)
    expected = log_likelihoods(model)
    assert abs(expected[0] - log_likelihoods(load(base))[0]) > 1e-2, "tells an adapter from none"
    model.save_pretrained(adapter)
    found = measured(tmp_path, "peft_moice lm_eval", f"pretrained={base},peft={adapter}")
    assert found == pytest.approx(expected, abs=1e-4)
    model.merge_and_unload().save_pretrained(merged)
    found = measured(tmp_path, "lm_eval", f"pretrained={merged},tokenizer={base},trust_remote_code=True")
    assert found == pytest.approx(expected, abs=1e-4)


def test_without_the_harness_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm_eval", "--tasks", "ruler"]) == 2
    assert "pip install 'lm_eval[hf]'" in capsys.readouterr().err
