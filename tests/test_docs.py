"""What the documents say of the code is there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for top in ("docs", "examples") for path in sorted((ROOT / top).rglob("*.md"))),
]


def names_of_tests(file: Path) -> set[str]:
    """Names of the tests in a file, methods as `Class::test`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_named_tests_exist(document):
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::([\w:]+)`", document.read_text()):
        existing = names_of_tests(ROOT / "tests" / file)
        assert name in {*existing, *(method.partition("::")[0] for method in existing)}, f"{file}::{name}"


def test_features_name_tests_that_exist():
    sections = tomllib.loads((ROOT / ".ci" / "features.toml").read_text())["section"]
    for test in (test for section in sections for row in section["row"] for test in row["tests"]):
        file, _, name = test.partition("[")[0].partition("::")
        existing = names_of_tests(ROOT / "tests" / file)
        assert name in {"*", *existing, *(method.partition("::")[0] for method in existing)}, test


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target
