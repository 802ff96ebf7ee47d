"""Multi-document questions ("Lost in the Middle"): 10, 20 and 30 documents, the one that answers first, in the middle
and last.
"""

from pathlib import Path
from typing import Any

from peft_moice.evaluation import MultiDocument, Result, evaluate

GOLD = {10: (0, 4, 9), 20: (0, 9, 19), 30: (0, 14, 29)}
"""By the number of documents: indices of the one that answers."""
MAX_NEW_TOKENS = 100


def find(folder: Path, documents: int) -> Path:
    """The file of nelson-liu/lost-in-the-middle with so many documents a question; else the one with the answering
    documents alone, beside which those of other questions are shown: easier than the retrieved ones.

    Raises:
        ValueError: the folder has neither.
    """
    name = f"nq-open-{documents}_total_documents_gold_at_0.jsonl.gz"
    oracle = "nq-open-oracle.jsonl.gz"
    for file in (folder / f"{documents}_total_documents" / name, folder / name, folder / oracle):
        if file.is_file():
            return file
    raise ValueError(
        f"{folder} holds neither {name} nor {oracle}. Give --data a folder with files of `qa_data` of "
        "https://github.com/nelson-liu/lost-in-the-middle."
    )


def measure(
    model: Any, tokenizer: Any, file: Path, documents: int, *, max_new_tokens: int = MAX_NEW_TOKENS, **options: Any
) -> Result:
    """Share of the questions whose answer stands in the first line that the model writes.

    Args:
        model: with its adapter.
        tokenizer: its own.
        file: see [`find`].
        documents: a key of [`GOLD`].
        max_new_tokens: the most that is written. Default: 100.
        options: `num_groups`, the number of questions; `seed` and `name`, as [`evaluate`] takes them.
    """
    positions = [index / (documents - 1) for index in GOLD[documents]]
    options |= {"lengths": [documents], "positions": positions, "max_new_tokens": max_new_tokens}
    return evaluate(model, tokenizer, MultiDocument(file), **options)


def columns(result: Result) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Cells of the table: means and intervals by position, over all, and the gap of best and worst position."""
    (documents,) = result.lengths
    cells: dict[str, tuple[float, tuple[float, float] | None]] = {
        f"{documents}: {place}": (result.mean(position=position), result.interval(position=position))
        for place, position in zip(("first", "middle", "last"), result.positions, strict=True)
    }
    cells[f"{documents}: average"] = (result.mean(), result.interval())
    cells[f"{documents}: gap"] = (result.gap(), None)
    return cells


COLUMNS = [f"{n}: {place}" for n in GOLD for place in ("first", "middle", "last", "average", "gap")]
