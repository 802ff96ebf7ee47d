"""The script for the day when a GPU is at hand, tried on the CPU: it reports what fails and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "measure_cuda.py"


@pytest.mark.slow
def test_every_figure_is_a_line(tmp_path):
    output = tmp_path / "folder" / "cuda.json"
    options = ["--device", "cpu", "--tiny", "--tokens", "24", "--repetitions", "1", "--output", str(output)]
    command = [sys.executable, str(SCRIPT), *options, "--parts", "attention", "whole model"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == output.read_text()
    _, *figures = (json.loads(line) for line in printed.splitlines())
    layers = [figure for figure in figures if figure["part"] == "attention"]
    jobs, variants = 3, 1 + 3 * 3
    assert len(layers) == 2 * variants * jobs
    for figure in layers:
        # No kernels for CUDA here, which is reported and stops nothing.
        assert ("it is for CUDA" in figure["failed"]) if figure["implementation"] == "triton" else figure["ms"] > 0
    models = [(figure["variant"], figure["job"]) for figure in figures if figure["part"] == "whole model"]
    assert models == [(name, job) for name in ("base", "K = 7", "K = 2", "K = 1") for job in ("decode", "prefill")]


@pytest.mark.slow
def test_what_does_not_fit_the_time_is_named(tmp_path):
    options = ["--device", "cpu", "--tiny", "--tokens", "8", "--repetitions", "1", "--seconds", "0"]
    command = [sys.executable, str(SCRIPT), *options, "--output", str(tmp_path / "cuda.json")]
    command += ["--parts", "whole model", "sanitizer"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = [json.loads(line) for line in printed.splitlines()]
    assert {figure["part"] for figure in figures if "for want of time" in figure.get("left out", "")} >= {
        "whole model"
    }


@pytest.mark.slow
def test_implementations_are_compared_with_the_reference(tmp_path):
    options = ["--device", "cpu", "--head-dims", "8", "--dtypes", "float32", "--parts", "comparison"]
    command = [sys.executable, str(SCRIPT), *options, "--output", str(tmp_path / "cuda.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *figures = (json.loads(line) for line in printed.splitlines())
    assert max(figure["keys"] for figure in figures) == 5000
    assert {figure["implementation"] for figure in figures if "refused" not in figure} >= {"delegated", "folded"}
    assert [figure for figure in figures if figure.get("fault") is not None] == []
    assert all("it is for CUDA" in figure["refused"] for figure in figures if figure["implementation"] == "triton")
