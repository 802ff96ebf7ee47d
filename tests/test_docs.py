"""What the documents say of the code is there."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for top in ("docs", "examples") for path in sorted((ROOT / top).rglob("*.md"))),
]


@functools.cache
def names_of_tests(file: str) -> set[str]:
    """Names of the tests and classes in a file, methods as `Class::test`."""
    names = set()
    for node in ast.parse((ROOT / "tests" / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_named_tests_exist():
    sections = tomllib.loads((ROOT / ".ci" / "features.toml").read_text())["section"]
    named = [test.partition("[")[0] for section in sections for row in section["row"] for test in row["tests"]]
    for document in DOCUMENTS:
        named += re.findall(r"`(?:tests/)?(test_\w+\.py::[\w:]+)`", document.read_text())
    for file, name in (test.split("::", 1) for test in named):
        assert name == "*" or name in names_of_tests(file), f"{file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target
