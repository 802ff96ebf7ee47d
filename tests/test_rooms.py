"""The page on architecture lists every room of the package, and imports go one way."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_moice"


def listed_rooms() -> set[str]:
    """Paths within the package that the tree of docs/architecture.md names, read by their indentation."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"```\npeft_moice/\n(.*?)```", text, re.DOTALL).group(1)
    folders, rooms = [], set()
    for line in filter(None, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, purpose = line.strip().partition(" ")
        assert purpose.strip(), f"docs/architecture.md says nothing about {name}"
        folders[depth - 1 :] = [name.rstrip("/")]
        if not name.endswith("/"):
            rooms.add("/".join(folders))
    return rooms


def test_the_page_lists_every_room():
    files = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".c", ".h") and path.name != "__init__.py"
    }
    assert listed_rooms() == files


def imports_of(path: Path) -> set[Path]:
    """Files of the package that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            modules = [folder / f"{alias.name}.py" for alias in node.names]
            modules = [module for module in modules if module.exists()]
            found |= set(modules or [folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")])
    return found


def test_no_import_cycle():
    graph = {path: imports_of(path) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, graph.values())) > 50
    while leaves := {path for path, targets in graph.items() if not targets & graph.keys() - {path}}:
        graph = {path: targets for path, targets in graph.items() if path not in leaves}
    assert not graph, f"these files import each other: {sorted(str(path.relative_to(PACKAGE)) for path in graph)}"
