"""The benchmark on a tiny model: every row it promises, on one set of weights that it leaves as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import load, save_tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import benchmark  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
def test_table_json_and_picture(folder, tmp_path):
    output = tmp_path / "results" / "benchmark.json"
    lengths = {"prompt_length": 64, "cached_tokens": 40, "train_length": 32, "repetitions": 1, "sweep_repetitions": 1}
    options = {**lengths, "model": folder, "output": output, "threads": 1, "top_ks": 2}
    command = [sys.executable, str(EXAMPLES / "benchmark.py")]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    jobs = ["prefill", "decode step", "training step"]
    assert rows == ["", "---", *jobs, "peak memory, prefill", "peak memory, training step"]
    results = json.loads(output.read_text())
    assert set(results["times"]["prefill"]) == {"base", "K = 2", "Buckets"}
    assert set(results["memory"]["training step"]) == {"base", "K = 2"}
    assert output.with_suffix(".png").stat().st_size > 1000


def test_variants_share_the_weights_and_nothing_else(folder):
    model = load(folder)
    args = benchmark.Arguments(top_ks=[2])
    found = benchmark.variants(model, args, "training step")
    ids = torch.arange(2, 30)[None]
    before = model(ids).logits
    weight = model.model.embed_tokens.weight
    for variant in found.values():
        assert any(parameter is weight for parameter in variant.parameters())
        benchmark.make_job(variant, "training step", 28)()
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(found["K = 2"].eval()(ids).logits, before)


def test_bounds(folder):
    """With one angle the operations are the base model's; each further one adds a score product."""
    model = load(folder)
    prefill = benchmark.bounds(model, [1, 2, 3], "prefill", 100)
    assert prefill["K = 1"] == 1.0
    assert prefill["K = 3"] - prefill["K = 2"] == pytest.approx(prefill["K = 2"] - 1.0)
    layers, heads, size = 3, 4, 16
    weights = layers * (32 * 16 * (2 * heads + 2 * 2) + 3 * 32 * 48)
    product = layers * heads * size * 100**2
    assert prefill["K = 2"] == pytest.approx(1 + product / (200 * weights + 2 * product))
