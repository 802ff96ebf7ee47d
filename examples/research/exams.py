"""Exams about a long document: the closed tasks of L-Eval (An et al., ACL 2024)."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_moice.evaluation import Example
from peft_moice.evaluation.files import Deck, read_json_lines
from peft_moice.evaluation.task import Scoring
from peft_moice.training.data.sequences import check_fast


class Exam:
    """Questions of which one answer out of several is right: letters, or True and False.

    Questions with several right letters are left out. An answer is right if it is likelier than the other choices; so
    a model that does not write letters is measured as well, unlike with L-Eval's own metric, which reads what it
    writes.

    Args:
        file: `coursera.jsonl`, `tpo.jsonl`, `quality.jsonl` or `sci_fi.jsonl` of L-Eval, or a file in their format.
        tokenizer: cuts documents to their length, a fast one.

    Raises:
        ValueError: the file is not in its format, or holds no question of one right answer.
    """

    unit = "tokens"
    scoring: Scoring = "choice"

    def __init__(self, file: str | Path, tokenizer: Any):
        check_fast(tokenizer)
        self.name = f"exam: {Path(file).name.partition('.')[0]}"
        self.tokenizer = tokenizer
        self.documents = []
        for record in read_json_lines(file, ("instructions", "outputs", "input")):
            pairs = zip(record["instructions"], record["outputs"], strict=False)
            questions = [question for pair in pairs if (question := _question(*pair)) is not None]
            if questions:
                self.documents.append((record["input"], questions))
        if not self.documents:
            raise ValueError(f"{file} holds no question with one right answer. Give a closed task of L-Eval.")
        self._order = Deck(self.documents)

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """A document, cut after `length` tokens, and all of its questions. Nobody knows where answers stand, so
        positions are ignored.
        """
        text, questions = self._order.deal(rng)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in offsets["offset_mapping"]]
        shown = text[: ends[min(length, len(ends)) - 1]]
        return [
            Example(
                f"{shown}\n\nAnswer the question about the document above.\n\n{question}",
                (answer,),
                None,
                length,
                opening="The answer is ",
                choices=choices,
            )
            for question, answer, choices in questions
        ]


def _question(instruction: str, output: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Question, right answer and choices; None without exactly one right answer."""
    output = output.strip()
    true_or_false = re.match(r"(True|False)\b", output)
    if true_or_false:
        return instruction, true_or_false[1], ("True", "False")
    letters = tuple(re.findall(r"^\s*([A-Z])[.)]", instruction, flags=re.MULTILINE))
    return (instruction, output, letters) if output in letters else None
