"""Made data in the formats of the real ones, for `--small` without `--data`: enough to run every line of the code."""

import gzip
import json
import random
from pathlib import Path

from forms import docstrings, passages


def write(folder: Path, documents: int = 1, questions: int = 2, pairs: int = 40, seed: int = 0) -> Path:
    """Files of "Lost in the Middle" and L-Eval, which hold other people in other cities.

    Args:
        folder: where to.
        documents: of each task of L-Eval.
        questions: about each of them.
        pairs: questions of "Lost in the Middle", with a passage each.
        seed: of all.
    """
    rng, text = random.Random(seed), docstrings()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    while len(rows) < pairs:
        shown, asked = passages(rng, text)
        for line, (question, answer) in zip(shown.splitlines(), asked, strict=True):
            title, _, rest = line.partition("(Title: ")[2].partition(") ")
            passage = {"title": title, "text": rest, "isgold": True}
            rows.append(
                {
                    "question": question.splitlines()[0].removeprefix("Question: "),
                    "answers": [answer],
                    "ctxs": [passage],
                }
            )
    lines = "\n".join(map(json.dumps, rows[:pairs])).encode()
    (folder / "nq-open-oracle.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    for task, (evaluation, answers) in _TASKS.items():
        records = []
        for _ in range(documents):
            chosen = rng.sample(rows, 6)
            asked = [f"{row['question']}?\n" + _choices(row, chosen) for row in chosen[:questions]]
            record = {"instructions": asked, "outputs": [answers(row) for row in chosen[:questions]]}
            record |= {"input": " ".join(row["ctxs"][0]["text"] for row in chosen), "evaluation": evaluation}
            records.append(json.dumps(record))
        (folder / f"{task}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    return folder


def _choices(row: dict, others: list[dict]) -> str:
    """The right answer stands at B."""
    answers = dict.fromkeys(other["answers"][0] for other in others if other["answers"] != row["answers"])
    answers = [*answers][:1] + row["answers"] + [*answers][1:]
    return "\n".join(f"{letter}. {answer}" for letter, answer in zip("ABCD", answers, strict=False))


_TASKS = {
    **dict.fromkeys(("tpo", "quality"), ("exam", lambda row: "B")),
    "coursera": ("exam", lambda row: "BC"),
    "sci_fi": ("exam", lambda row: "True [fact: False]"),
    "gsm100": ("exam", lambda row: "It takes two steps. The answer is 4"),
    "codeU": ("exam", lambda row: "4 5"),
    "financial_qa": ("f1", lambda row: row["answers"][0]),
    "gov_report_summ": ("rouge", lambda row: row["ctxs"][0]["text"]),
}
