"""The page on architecture lists every room of the package, and imports go one way: from a room to those below it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_moice"
MOST_ROOMS = 12


def listed_rooms() -> list[str]:
    """The rooms that the table of docs/architecture.md names, top floor first."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return [
        row.rstrip("/").removesuffix(".py") for row in re.findall(r"^\| `(\w+(?:/|\.py))` \| .", text, re.MULTILINE)
    ]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "__main__")]


def imports_of(path: Path) -> set[Path]:
    """Files of the package that a file imports, inside of functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                places = (folder / f"{alias.name}.py", folder / alias.name / "__init__.py", folder.with_suffix(".py"))
                found.add(next((place for place in places if place.exists()), folder / "__init__.py"))
    return found - {path}


def test_the_page_lists_every_room():
    rooms = listed_rooms()
    assert sorted(rooms) == sorted({room_of(path) for path in files()})
    assert len(rooms) <= MOST_ROOMS


def test_no_room_imports_one_above_it():
    floors = {room: floor for floor, room in enumerate(listed_rooms())}
    upward = {
        f"{path.relative_to(PACKAGE)} imports {target.relative_to(PACKAGE)}"
        for path in files()
        for target in imports_of(path)
        if room_of(target) in floors and floors[room_of(target)] < floors[room_of(path)]
    }
    assert not upward


def test_no_file_imports_itself_around_a_corner():
    graph = {path: imports_of(path) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, graph.values())) > 50
    while leaves := {path for path, targets in graph.items() if not targets & graph.keys() - {path}}:
        graph = {path: targets for path, targets in graph.items() if path not in leaves}
    assert not graph, f"these files import each other: {sorted(str(path.relative_to(PACKAGE)) for path in graph)}"
