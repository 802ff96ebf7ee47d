"""The benchmark on a tiny model: every row it promises, on one set of weights that it leaves as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import load, save_tiny_model

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import benchmark  # noqa: E402
from benchmark import Row  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
def test_table_json_and_picture(folder, tmp_path):
    output = tmp_path / "results" / "benchmark.json"
    lengths = {"prefill": 64, "decode": 40, "train": 32, "identity": 24, "memory": 48, "curve": 16}
    options = {**lengths, "repetitions": 1, "model": folder, "output": output, "threads": 1, "top_ks": 2}
    command = [sys.executable, str(BENCHMARKS / "benchmark.py"), "--buckets"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    jobs = ["decode step, 40 cached tokens", "prefill, 64 tokens", "training step, 32 tokens"]
    further = ["training step, 24 tokens, identity start", "peak memory, prefill, 48 tokens"]
    assert rows == ["", "---", *jobs, *further]
    found = {name: set(row["found"]) for name, row in json.loads(output.read_text())["rows"].items()}
    assert set(found) == {*jobs, *further, "prefill, 16 tokens"}
    assert found["prefill, 64 tokens"] == {"base", "K = 2", "N copies", "Buckets"}
    assert all(found[name] == {"base", "K = 2"} for name in (jobs[0], jobs[2], *further))
    assert output.with_suffix(".png").stat().st_size > 1000


def test_rows_are_printed_one_by_one(folder, tmp_path, monkeypatch, capsys):
    """Who stops it early has what was measured until then."""
    output = tmp_path / "benchmark.json"
    args = benchmark.Arguments(folder, prefill=[16, 2], decode=[], train=[], identity=[], top_ks=[2])
    args.output, args.threads, measured = str(output), torch.get_num_threads(), []

    def times(model, args, row):
        if measured:
            raise KeyboardInterrupt
        measured.append(row)
        return {"base": 2.0, "K = 2": 3.0, "N copies": 8.0}

    monkeypatch.setattr(benchmark, "times", times)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(args)
    assert "| prefill, 16 tokens | 2.00 s | 1.50 (" in capsys.readouterr().out
    assert list(json.loads(output.read_text())["rows"]) == ["prefill, 16 tokens"]


def test_a_model_may_be_cut_to_its_first_layers(folder):
    whole = load(folder).eval()
    cut = benchmark.load(benchmark.Arguments(folder, layers=1, threads=torch.get_num_threads())).eval()
    ids = torch.arange(2, 20)[None]
    first = whole.model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(cut.model(ids, output_hidden_states=True).last_hidden_state, whole.model.norm(first))
    assert cut.config.num_hidden_layers == 1
    assert len(benchmark.adapted(cut, 2, "auto", False).get_model_status().active_adapters) == 1


@pytest.mark.filterwarnings("error:.*past_key_values")  # the name that the model has for a cache
def test_variants_share_the_weights_and_nothing_else(folder):
    model = load(folder)
    args = benchmark.Arguments(top_ks=[2])
    found = benchmark.variants(model, args, Row("training step", 28))
    ids = torch.arange(2, 30)[None]
    before = model(ids).logits
    weight = model.model.embed_tokens.weight
    for variant in found.values():
        assert any(parameter is weight for parameter in variant.parameters())
        for job in ("decode step", "training step"):
            benchmark.make_job(variant, job, 28)()
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(found["K = 2"].eval()(ids).logits, before)


def test_bounds(folder):
    """With one angle the operations are the base model's; each further one adds a score product."""
    model = load(folder)
    prefill = benchmark.bounds(model, [1, 2, 3], Row("prefill", 100))
    assert prefill["K = 1"] == 1.0
    assert prefill["K = 3"] - prefill["K = 2"] == pytest.approx(prefill["K = 2"] - 1.0)
    layers, heads, size = 3, 4, 16
    weights = layers * (32 * 16 * (2 * heads + 2 * 2) + 3 * 32 * 48)
    product = layers * heads * size * 100**2
    assert prefill["K = 2"] == pytest.approx(1 + product / (200 * weights + 2 * product))
