"""The versions that the package declares are those that the tests run with, and others are warned of."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from peft_moice.tuner.versions import untested, warn_of_untested_versions

ROOT = Path(__file__).parent.parent
NAMES = ("torch", "transformers", "peft")
BEYOND_CI = {"torch": Version("2.15")}
"""Versions that the tests passed with elsewhere, see docs/versions.md."""


def pinned(constraints: str) -> dict[str, Version]:
    lines = (ROOT / constraints).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: Version(next(iter(r.specifier)).version) for r in requirements}


@pytest.mark.parametrize("name", NAMES)
def test_the_declared_bounds_are_the_versions_that_the_tests_ran_with(name):
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    specifier = next(r for r in map(Requirement, lines) if r.name == name).specifier
    installed = next(r for r in map(Requirement, importlib.metadata.requires("peft_moice")) if r.name == name)
    assert {bound.operator for bound in installed.specifier} == {">=", "<"}, "of what the warning reads"
    assert installed.marker is None
    bounds = {bound.operator: bound.version for bound in specifier}
    lowest, newest = pinned("constraints-lowest.txt")[name], pinned("constraints.txt")[name]
    newest = max(newest, BEYOND_CI.get(name, newest))
    assert bounds == {">=": f"{lowest.major}.{lowest.minor}", "<": f"{newest.major}.{newest.minor + 1}"}


WITHIN = ("5.17.0", "5.24.0", "5.24.9+local", "5.24.0.dev0")
OUTSIDE = ("5.16.2", "5.25.0", "5.25.0.dev0", "6.0")


@pytest.mark.parametrize("version", WITHIN + OUTSIDE)
def test_versions_outside_of_the_bounds_are_warned_of(monkeypatch, version):
    line = "transformers<5.25,>=5.17"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [line, "tqdm", 'trl<0.1; extra == "train"'])
    assert [str(requirement) for requirement in untested([line])] == [line] * (version in OUTSIDE)
    if version in OUTSIDE:
        with pytest.warns(UserWarning, match=rf"transformers {version} is installed.*tested with transformers<5.25"):
            warn_of_untested_versions()
    else:
        warn_of_untested_versions()


def test_a_checkout_that_was_not_installed_is_imported_without_a_warning(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    warn_of_untested_versions()


@pytest.mark.slow
def test_importing_the_package_warns():
    code = """
import importlib.metadata, warnings
requires = importlib.metadata.requires
importlib.metadata.requires = lambda name: ["torch<2"] if name == "peft_moice" else requires(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_moice
print([str(w.message) for w in caught if "peft_moice is tested with torch<2" in str(w.message)])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.count("is installed") == 1
