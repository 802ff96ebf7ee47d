"""The script for the day when a GPU is at hand, tried on the CPU: it reports what fails and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "measure_cuda.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def figures(tmp_path):
    """Runs the script, and gives the figures that it printed and wrote behind the line about the machine."""

    def run(*options: str) -> list[dict]:
        output = tmp_path / "folder" / "cuda.json"
        command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(output), *options]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert printed == output.read_text()
        return [json.loads(line) for line in printed.splitlines()][1:]

    return run


TINY = ("--tiny", "--repetitions", "1", "--tokens")


def test_every_figure_is_a_line(figures):
    found = figures(*TINY, "24", "--parts", "attention", "whole model")
    layers = [figure for figure in found if figure["part"] == "attention"]
    jobs, variants = 3, 1 + 3 * 3
    assert len(layers) == 2 * variants * jobs
    for figure in layers:
        # No kernels for CUDA here, which is reported and stops nothing.
        assert ("it is for CUDA" in figure["failed"]) if figure["implementation"] == "triton" else figure["ms"] > 0
    models = [(figure["variant"], figure["job"]) for figure in found if figure["part"] == "whole model"]
    assert models == [(name, job) for name in ("base", "K = 7", "K = 2", "K = 1") for job in ("decode", "prefill")]


def test_what_does_not_fit_the_time_is_named(figures):
    found = figures(*TINY, "8", "--seconds", "0", "--parts", "whole model", "sanitizer")
    assert "whole model" in {figure["part"] for figure in found if "for want of time" in figure.get("left out", "")}


def test_implementations_are_compared_with_the_reference(figures):
    found = figures("--head-dims", "8", "--dtypes", "float32", "--parts", "comparison")
    assert max(figure["keys"] for figure in found) == 5000
    assert {figure["implementation"] for figure in found if "refused" not in figure} >= {"delegated", "folded"}
    assert [figure for figure in found if figure.get("fault") is not None] == []
    assert all("it is for CUDA" in figure["refused"] for figure in found if figure["implementation"] == "triton")
