"""Runs PEFT's own test-suite against MoICE and prints how many of its tests pass.

    python tests/conformance/run_peft_suite.py [pytest arguments]

Downloads the source distribution of the installed PEFT version from PyPI into a temporary folder, builds tiny models
of four families in place of those that the tests fetch from the Hub, and runs `suite.py` beside this file. Takes a few
minutes. Needs pip with access to PyPI, pytest and accelerate; `diffusers` and `datasets`, which the tests import but
do not need here, are replaced by empty modules.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUBS = {
    "diffusers": "class StableDiffusionPipeline: pass\n",
    "datasets": "def load_dataset(*args, **kwargs): raise RuntimeError('no data sets here')\n",
}


def download_tests(folder: Path) -> None:
    """Unpack the tests of the installed PEFT version into `folder`/peft_tests."""
    requirement = f"peft=={version('peft')}"
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "peft", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", folder, requirement], check=True)
    (archive_file,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive_file) as archive:
        archive.extractall(folder, filter="data")
    archive_file.unlink()
    (source,) = folder.glob("peft-*/")
    (source / "tests").rename(folder / "peft_tests")
    (folder / "peft_tests" / "__init__.py").touch()
    for name, code in STUBS.items():
        (folder / f"{name}.py").write_text(code)


def build_models(folder: Path) -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from tiny_models import FAMILIES, save_tiny_model

    for family in FAMILIES:
        save_tiny_model(folder / family, family)


def print_table(report: Path) -> int:
    """Print outcomes by test and the reasons of what did not pass; return the number of failures."""
    outcomes: dict[str, Counter] = defaultdict(Counter)
    reasons: dict[str, Counter] = {"failed": Counter(), "skipped": Counter()}
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname').rpartition('.')[2]}.{case.get('name').partition('[')[0]}"
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reasons[outcome][f"{test}: {(child.get('message') or '').strip().splitlines()[0][:160]}"] += 1
        outcomes[test][outcome] += 1

    print(f"{'':75} passed failed skipped")
    for test, counts in sorted(outcomes.items()):
        print(f"{test:75} {counts['passed']:6} {counts['failed']:6} {counts['skipped']:7}")
    total = sum(outcomes.values(), Counter())
    print(f"{'all':75} {total['passed']:6} {total['failed']:6} {total['skipped']:7}")
    for outcome, counts in reasons.items():
        print(f"\n{outcome}:")
        for reason, count in sorted(counts.items()):
            print(f"{count:4} x {reason}")
    return total["failed"]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download_tests(folder)
        build_models(folder / "models")
        paths = [str(folder), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PEFT_SUITE_MODELS": str(folder / "models"),
            "HF_HUB_OFFLINE": "1",
        }
        report = folder / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", f"--rootdir={HERE}"]
        command = [sys.executable, "-m", "pytest", str(HERE / "suite.py"), *options, *sys.argv[1:]]
        subprocess.run(command, env=environment, cwd=folder)
        return print_table(report)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
