"""The documentation as a site: every page has its place and a link to it, and says what the code says."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from peft_moice.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / ".ci"))

import run_snippets  # noqa: E402
from commands_page import commands_page  # noqa: E402

GENERATED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "examples/measure_train_picture.ipynb": "guide/notebook.md",
    "peft_moice/cli": "commands.md",
}
"""Pages that .ci/site_hooks.py makes of what lies outside of docs/."""
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
TROUBLESHOOTING = DOCS / "guide" / "troubleshooting.md"
FOREIGN = {
    "Must flatten tensors with uniform dtype but got …": "torch/distributed/fsdp/_flat_param.py",
    "The checkpoint you are trying to load has model type `…` but Transformers does not recognize this architecture": (
        "transformers/models/auto/configuration_auto.py"
    ),
    "the current text generation call has exceeded the model's predefined maximum length": (
        "transformers/generation/stopping_criteria.py"
    ),
}
"""Messages of others, and where they are."""


def pages() -> set[str]:
    return {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def old_addresses() -> set[str]:
    """Pages that only say where their content is now."""
    return {line.strip("/") for line in SETTINGS.get("not_in_nav", "").splitlines()}


def in_navigation() -> list[str]:
    def walk(entries):
        for entry in entries:
            for value in entry.values():
                yield from walk(value) if isinstance(value, list) else [value]

    return list(walk(SETTINGS["nav"]))


def test_every_page_has_one_place_in_the_navigation():
    assert sorted([*in_navigation(), *old_addresses()]) == sorted(pages() | {*GENERATED.values()})


def test_every_page_is_linked_from_another():
    linked = set()
    for page in pages():
        for target in re.findall(r"\]\(([\w./-]+(?:\.(?:md|ipynb)|/cli))[)#]", (DOCS / page).read_text()):
            path = (DOCS / page).parent.joinpath(target).resolve()
            if path != DOCS / page:
                linked.add(str(path.relative_to(ROOT)))
    assert {f"docs/{page}" for page in pages() - old_addresses()} | {*GENERATED} <= linked | {"docs/index.md"}


@cache
def texts_of(folder: Path) -> list[str]:
    """Every string in Python files, with `…` in the place of what is filled in."""
    found = []
    for file in folder.rglob("*.py") if folder.is_dir() else [folder]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[srd]", "…", node.value))
    return found


def says(text: str, quote: str) -> bool:
    """Whether a message can read as quoted, with `…` for what is filled in."""
    pattern = ".*".join(re.escape(part) for part in quote.split("…"))
    return re.search(pattern, text, re.DOTALL) is not None


def quoted_messages() -> list[str]:
    return [quote for _, quote in re.findall(r"^### (`+ ?)(.+?) ?`+$", TROUBLESHOOTING.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("quote", [quote for quote in quoted_messages() if quote != "KeyError: 'MOICE'"])
def test_quoted_messages_are_in_the_code(quote):
    if quote in FOREIGN:
        package, _, file = FOREIGN[quote].partition("/")
        where = Path(find_spec(package).origin).parent / file
    else:
        where = ROOT / "peft_moice"
    assert any(says(text, quote) for text in texts_of(where))


@pytest.mark.slow
def test_without_the_import_peft_raises_what_is_quoted():
    assert "KeyError: 'MOICE'" in quoted_messages()
    code = f"import peft; peft.PeftConfig.from_pretrained({str(ROOT / 'tests' / 'saved' / 'adapter')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip().endswith("KeyError: 'MOICE'")


def test_the_reference_has_every_public_name():
    entries = {
        entry.rpartition(".")[2]
        for page in (DOCS / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    for name in ("peft_moice", "peft_moice.training.data", "peft_moice.evaluation"):
        module = importlib.import_module(name)
        public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
        assert public - {"__version__", "Example"} <= entries


@pytest.mark.parametrize(
    "page", [page for page in [*sorted(pages()), "../README.md"] if run_snippets.commands_of(DOCS / page)]
)
def test_command_lines_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # parsing makes the folder of the output
    for name, *rest in run_snippets.commands_of(DOCS / page):
        if "--help" not in [name, *rest]:
            # Some ask for bf16, which Trainer refuses where there is neither a GPU nor this.
            COMMANDS[name].parser().parse([*rest, "--use_cpu"] if name == "train" else rest)


def test_the_reference_of_commands_says_what_parsers_know():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", commands_page(), re.MULTILINE | re.DOTALL))
    assert sections.keys() == COMMANDS.keys()
    assert "| `--questions N` | `8` | Questions at each position and length. |" in sections["measure"]
    assert "| `--init NAME` | `normal` | " in sections["train"] and "One of `identity`, `normal`." in sections["train"]
    assert "| `ADAPTER` |  | Folder or Hub id" in sections["info"]
    for name, module in COMMANDS.items():
        rows = re.findall(r"^\| `([\w-]+)", sections[name], re.MULTILINE)
        known = {*module.parser()._option_string_actions} | {"MODEL", "ADAPTER", "OUTPUT_DIR", "MODULE"}
        assert {*rows} <= known and len(rows) == len({*rows}) >= 1
        assert f"peft-moice {name} " in sections[name]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run_snippets.save_random_model(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in sorted(pages()) if run_snippets.blocks_of(DOCS / page)] + ["../README.md"]
)
def test_python_blocks_run(page, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_snippets.run(DOCS / page, random_model, tmp_path)


@pytest.mark.slow
def test_the_notebook_measures_trains_and_draws(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples" / "measure_train_picture.ipynb", 4)
    (parameters,) = (cell for cell in notebook.cells if cell.source.startswith("MODEL = None"))
    values = {"MODEL": str(random_model), "FACTS": 4, "LISTS": 1, "STEPS": 2, "OUTPUT_DIR": str(tmp_path / "routers")}
    for name, value in values.items():
        assert re.search(rf"^{name} = ", parameters.source, re.MULTILINE)
        parameters.source = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", parameters.source)
    path = {"metadata": {"path": str(ROOT / "examples")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=path).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert (tmp_path / "routers" / "adapter_model.safetensors").is_file()
