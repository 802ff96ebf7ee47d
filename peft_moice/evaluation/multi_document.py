"""Multi-document question answering ("Lost in the Middle", Liu et al., TACL 2024)."""

import random
from collections.abc import Sequence
from pathlib import Path

from .files import Deck, read_json_lines
from .task import Example, Scoring, place

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might "
    "be irrelevant)."
)


class MultiDocument:
    """Natural Questions over one passage that answers and others that do not, in the paper's prompt.

    The others are passages of other questions, drawn at random among those that contain no answer: easier than the
    paper's, which a retriever found for the same question. The score is the paper's `best_subspan_em`: whether the
    first line that the model writes contains an answer.

    Args:
        file: `qa_data/nq-open-oracle.jsonl.gz` of `nelson-liu/lost-in-the-middle`, or a file in its format.

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
        if length > len(self.records):
            raise ValueError(f"`length` is {length}, but the file has {len(self.records)} passages. Lower it.")
        asked = self._order.deal(rng)
        gold = asked["ctxs"][0]
        others: list[dict[str, str]] = []
        answers = [answer.lower() for answer in asked["answers"]]
        for record in rng.sample(self.records, len(self.records)):
            passage = record["ctxs"][0]
            if len(others) < length - 1 and not any(answer in passage["text"].lower() for answer in answers):
                others.append(passage)
        if len(others) < length - 1:
            raise ValueError(
                f"Only {len(others)} passages of the file do not answer {asked['question']!r}. Lower `length`."
            )
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
