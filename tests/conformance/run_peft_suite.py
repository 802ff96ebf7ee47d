"""Runs PEFT's own test-suite against MoICE, in the three parts of the table in docs/verbs.md.

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
        options = ["-q", "-rfs", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={HERE}", *sys.argv[1:]]
        command = [sys.executable, "-m", "pytest", str(HERE / "suite.py"), *options]
        failed = 0
        for tests in ("TestDecoders", "TestCustomModels", "TestMultipleActiveAdapters or TestMixedAdapterBatches"):
            print(f"{tests}:", flush=True)
            failed |= subprocess.run([*command, "-k", tests], env=environment, cwd=folder).returncode
        return failed


if __name__ == "__main__":
    sys.exit(main())
