"""Multi-document question answering ("Lost in the Middle", Liu et al., TACL 2024)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import Deck, read_json_lines
from .task import Example, Scoring, place

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might "
    "be irrelevant)."
)


class MultiDocument:
    """Natural Questions over one passage that answers and others that do not, in the paper's prompt.

    The others are those that the file gives with a question, the paper's, which a retriever found for it. Where it
    gives none, they are passages of other questions, drawn at random among those that contain no answer: easier. The
    score is the paper's `best_subspan_em`: whether the first line that the model writes contains an answer.

    Args:
        file: of `nelson-liu/lost-in-the-middle`, or in its format: `qa_data/nq-open-oracle.jsonl.gz` has no other
            passages, `qa_data/20_total_documents/nq-open-20_total_documents_gold_at_0.jsonl.gz` 19. The passage that
            answers is the one with `isgold`, else the first.

    Raises:
        ValueError: the file is not in its format.
    """

    name = "multi-document QA"
    unit = "passages"
    scoring: Scoring = "any"

    def __init__(self, file: str | Path):
        self.records = read_json_lines(file, ("question", "answers", "ctxs"))
        for record in self.records:
            if not record["answers"] or not record["ctxs"]:
                raise ValueError(
                    f"{file}: the question {record['question']!r} has no answer or no passage. Leave it out."
                )
        self._order = Deck(self.records)

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """See [`Task.draw`]. Latest positions first, because prompts begin alike up to the passage that answers."""
        asked = self._order.deal(rng)
        gold = _gold(asked)
        others = [passage for passage in asked["ctxs"] if passage is not gold] or self._of_other_questions(rng, asked)
        if len(others) < length - 1:
            raise ValueError(
                f"`length` is {length}, but only {len(others)} passages go with {asked['question']!r}. Lower it."
            )
        others = others[: length - 1]
        examples = []
        for position in sorted(positions, reverse=True):
            index = place(position, length)
            shown = [
                f"Document [{number}](Title: {passage['title']}) {passage['text']}"
                for number, passage in enumerate([*others[:index], gold, *others[index:]], start=1)
            ]
            prompt = f"{_INSTRUCTION}\n\n" + "\n".join(shown) + f"\n\nQuestion: {asked['question']}\nAnswer:"
            examples.append(Example(prompt, tuple(asked["answers"]), position, length))
        return examples

    def _of_other_questions(self, rng: random.Random, asked: dict[str, Any]) -> list[dict[str, str]]:
        """Passages without an answer, in random order."""
        answers = [answer.lower() for answer in asked["answers"]]
        passages = [_gold(record) for record in rng.sample(self.records, len(self.records))]
        return [passage for passage in passages if not any(answer in passage["text"].lower() for answer in answers)]


def _gold(record: dict[str, Any]) -> dict[str, str]:
    """The passage that answers a question."""
    passages: list[dict[str, str]] = record["ctxs"]
    return next((passage for passage in passages if passage.get("isgold")), passages[0])
