"""Draws the tables: the paper, its official code as far as it was run, and ours; a cell that nobody filled is "empty".

CSV, Markdown and LaTeX. A difference is paired: the same questions, with a 95% interval over draws.
"""

import csv
import io
from pathlib import Path
from statistics import fmean
from typing import Any

import from_scratch
import leval
import log
import mdqa
from settings import METHODS, MODELS, QUOTED

EMPTY = "empty"
COLUMNS = {
    "leval": [*leval.CLOSED, "average", *leval.OPEN],
    "mdqa": mdqa.COLUMNS,
    "from_scratch": from_scratch.COLUMNS,
}
SOURCES = ("paper", "official code")
ROWS = (*METHODS, "pos2distill")
"""Methods in their order; of the last, figures are quoted only."""
Cell = tuple[float, tuple[float, float] | None]
Row = list[str]


def cells_of(record: dict[str, Any]) -> dict[str, Cell]:
    """Cells of a line of the log, by column."""
    if "values" in record:
        return {
            name: (mean, None if low is None else (low, high)) for name, (mean, low, high) in record["values"].items()
        }
    result = log.unpack(record["result"])
    return mdqa.columns(result) if record["table"] == "mdqa" else {record["task"]: (result.mean(), result.interval())}


def difference(record: dict[str, Any], base: dict[str, Any]) -> dict[str, Cell]:
    """The same of the difference of two lines that asked the same questions."""
    result, before = log.unpack(record["result"]), log.unpack(base["result"])
    name = f"{result.lengths[0]}: average" if record["table"] == "mdqa" else record["task"]
    return {name: result.difference(before)}


def rows_of(table: str, records: list[dict[str, Any]]) -> list[Row]:
    """Header and rows of a table: for each model and method the paper's figures, other quoted ones, ours, and how ours
    differ from the base model's.
    """
    records = [record for record in records if record["table"] == table]
    measured: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for record in records:
        easier = ", documents of other questions" * ("oracle" in record.get("data", ""))
        ours = "ours" + " (small)" * record["small"] + easier + f", seed {record['seed']}"
        who = (record["model"], record["method"] + _recipe(record), ours)
        measured.setdefault(who, {}).update(cells_of(record))
        base = next((other for other in records if _same_questions(record, other)), None)
        if base is not None and "result" in record:
            measured.setdefault((*who[:2], f"{ours}, minus base"), {}).update(difference(record, base))
    quoted = {
        (line["model"], line["method"], line["source"]): {
            name: (value, None) for name, value in line["values"].items()
        }
        for line in QUOTED
        if line["table"] == table
    }
    if table != "from_scratch":
        every = ((model.name, method, source) for model in MODELS.values() for method in ROWS for source in SOURCES)
        quoted = {**{who: {} for who in every}, **quoted}
    both = {**quoted, **measured}
    for cells in measured.values() if table == "leval" else ():
        if set(leval.CLOSED) <= set(cells):
            cells["average"] = (fmean(cells[task][0] for task in leval.CLOSED), None)
    filled = {name for cells in both.values() for name in cells}
    columns = [name for name in COLUMNS[table] if name in filled or name not in leval.OPEN]
    body = [[*who, *(_shown(both[who].get(name)) for name in columns)] for who in sorted(both, key=_order)]
    return [["model", "method", "source", *columns], *body]


def write(rows: list[Row], file: Path) -> None:
    """`file` with the endings `.csv`, `.md` and `.tex`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    file.with_suffix(".csv").write_text(text.getvalue(), encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    file.with_suffix(".tex").write_text(latex(rows), encoding="utf-8")


def without_empty(rows: list[Row]) -> list[Row]:
    """The rows in which anything stands."""
    return [row for row in rows if any(cell != EMPTY for cell in row[3:])]


def markdown(rows: list[Row]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def latex(rows: list[Row]) -> str:
    """A `tabular` of booktabs."""
    lines = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in rows]
    begin = rf"\begin{{tabular}}{{lll{'r' * (len(rows[0]) - 3)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def _same_questions(record: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(record.get(name) == other.get(name) for name in ("model", "task", "seed", "small", "data"))
    return same and other["method"] == "base" and record["method"] != "base"


def _recipe(record: dict[str, Any]) -> str:
    return f" ({record['recipe']})" if record.get("recipe") else ""


def _order(who: tuple[str, str, str]) -> tuple[Any, ...]:
    place = SOURCES.index(who[2]) if who[2] in SOURCES else len(SOURCES)
    return who[0], ROWS.index(who[1].partition(" ")[0]), place, who[1], who[2]


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return EMPTY
    mean, interval = cell
    return f"{mean:.4g}" if interval is None else f"{mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _escaped(cell: str) -> str:
    return "".join(f"\\{character}" if character in "&%$#_{}" else character for character in cell)
