"""L-Eval (An et al., ACL 2024): its closed tasks by its own rules, open ones by F1 and ROUGE.

The order of prompts and the rules are those of `Baselines/llama2-chat-test.py`, `Baselines/LEval_config.py` and
`Evaluation/` of https://github.com/OpenLMLab/LEval, quirks included. What models write is kept in its format, so that
its scripts and its judges (README.md) read it, too.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from peft_moice.evaluation import Result, Score
from peft_moice.evaluation.files import read_json_lines
from peft_moice.evaluation.grid import normalized
from peft_moice.evaluation.reader import Reader
from peft_moice.probing.evaluation_mode import evaluating
from peft_moice.training.data.sequences import render_chat

CHOICES = ("tpo", "quality", "coursera")
CLOSED = (*CHOICES, "sci_fi", "gsm100", "codeU")
OPEN = (
    "financial_qa", "gov_report_summ", "legal_contract_qa", "meeting_summ", "multidoc_qa", "narrative_qa",
    "natural_question", "news_summ", "paper_assistant", "patent_summ", "review_summ", "scientific_qa", "tv_show_summ",
)  # fmt: skip

# L-Eval's prompts ask for the same in words of its own, which are under GPL-3.
_READ = "You will read a long document, and then a task about it. "
_SYSTEM = {
    "coursera": _READ
    + "Questions offer options, of which one or more are right. Answer by their letters alone, such as "
    "A or BD.",
    "gsm100": "You will read solved questions. Solve the last one in the same way, and end with: The answer is, and "
    "the number.",
    "codeU": "You will read many functions of a program with their comments, and then calls of some of them. Work out "
    "from the code what the calls give.",
    "sci_fi": "You will read a science fiction story, and then a statement. Say True or False, by what the story "
    "says and not by what you know.",
    "closed": _READ
    + "Where a question offers options, one is right: answer by its letter alone, such as A. Answer other "
    "questions shortly and exactly.",
    "open": _READ + "It may ask for a summary, an answer or a paragraph.",
}
_OF_THE_DOCUMENT = "based on the world described in the document."
_OF_THE_WORLD = "based on the real-world knowledge and facts up until your last training"


def prompt(tokenizer: Any, task: str, document: str, question: str, answer: str, official: bool) -> list[int]:
    """Token ids of a question.

    Args:
        tokenizer: the model's.
        task: name of the file.
        document: cut to its length.
        question: about it.
        answer: the reference, of which open tasks tell the number of words.
        official: Llama-2's tags as the script writes them; else the tokenizer's chat template, the system prompt
            before the user's words.
    """
    system, opening, end = _SYSTEM.get(task, _SYSTEM["closed" if task in CLOSED else "open"]), "", "[/INST]"
    if task in ("gsm100", "codeU"):
        message, end = f"{document}\n\n{question}", ""
    elif task in CLOSED:
        message, opening = f"Document: {document}\nQuestion: {question}", "\nAnswer:"
        message += "\nGive the answer and nothing else."
    else:
        message = f"Document: {document}\nTask: {question}\nWrite about {len(answer.split())} words."
    if official:
        return _ids(tokenizer, f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n{message}{end}{opening}", True)
    text = render_chat(tokenizer, [{"role": "user", "content": f"{system}\n{message}"}], add_generation_prompt=True)
    return _ids(tokenizer, text + opening, not tokenizer.chat_template)


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def cut(tokenizer: Any, document: str, length: int, from_the_left: bool) -> str:
    """A document of at most `length` tokens: as many words, then 250 fewer until it fits. Code loses its beginning."""
    words = document.split(" ")
    for kept in range(length, 0, -250):
        if len(_ids(tokenizer, document)) <= length:
            break
        document = " ".join(words[-kept:] if from_the_left else words[:kept])
    return document


def letters_of(written: str, several: bool) -> str:
    """The letters that an answer to a multiple-choice question means; "A" if it has none, and nothing if empty."""
    if written in "ABCD":
        return written
    if not several and (first := re.search("[ABCD]", written)):
        return first[0]
    leading = written[: len(written) - len(written.lstrip("ABCD"))]
    if len(leading) <= 1:
        marked = re.findall(r"[A-D](?=[\s.)])", written[len(leading) :].split("Question")[0])
        leading += "".join(marked)
    return "".join(sorted(set(leading))) or "A"


def number_of(written: str) -> str:
    """The digits of a number: behind "The answer is", else of the last word of the first paragraph with a digit."""
    found = re.search(r"The answer is (\S+)", written)
    if found:
        word = found[1]
    else:
        words = [word for word in written.split("\n\n")[0].split(" ") if re.search(r"\d", word)]
        word = words[-1] if words else ""
    return re.sub(r"\D", "", word.split(".")[0])


def plain_code(text: str) -> str:
    """Output of code without what may be written in several ways."""
    text = re.sub(r"\s+", " ", text)
    for old, new in ((",", ""), ("'", ""), ("\\", ""), (".0", ""), ("] [", "]["), ("[ [", "[["), ("] ]", "]]")):
        text = text.replace(old, new)
    return text


def output_of(written: str, reference: str) -> str:
    """The words of an answer among which the output of code is looked for."""
    text, count = plain_code(written), len(reference.split()) + 3
    for phrase in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        text = text.replace(phrase, "")
    words = re.split(r"\s+", text.split("the final output")[-1])
    return " ".join(words[:count] if "the final output" in text else words[-count:])


def truth_of(written: str) -> str:
    """ "true" or "false", by the first word that has either."""
    for word in written.lower().split():
        for truth in ("true", "false"):
            if truth in word:
                return truth
    return "<error>"


def exact(written: str, reference: str) -> float:
    """1 if equal letters, or equal numbers, or if the first line of more than one character has the reference; 0.25
    if letters are some of several right ones.
    """
    if set(reference) <= set("ABCD"):
        return 1.0 if written == reference else 0.25 * (set(written) <= set(reference))
    try:
        return float(float(written) == float(reference))
    except ValueError:
        line = next((line for line in written.split("\n") if len(line) > 1), written)
        return float(reference.lower().replace(" ", "") in line.lower().replace(" ", ""))


def score_closed(task: str, written: str, reference: str) -> float:
    """0 to 1. For `sci_fi` the mean of two: by the document, and by the world."""
    if task in CHOICES:
        wanted = re.sub("[^A-D]", "", reference.split()[0]) or "A"
        return exact(letters_of(written, task == "coursera"), wanted)
    if task == "gsm100":
        return exact(number_of(written), number_of(reference))
    if task == "codeU":
        return exact(output_of(written, reference), plain_code(reference))
    pairs = zip(written.split("[fact:")[:2], reference.lower().split("[fact:"), strict=True)
    return sum(exact(truth_of(part), wanted.strip(" ]")) for part, wanted in pairs) / 2


def f1(written: str, reference: str) -> float:
    """SQuAD's, of words."""
    return _f_measure(Counter(normalized(written).split()), Counter(normalized(reference).split()))


def rouge(written: str, reference: str) -> float:
    """The geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L (F measures, no stemming)."""
    a, b = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (written, reference))
    scores = [_f_measure(_grams(a, size), _grams(b, size)) for size in (1, 2)]
    row = [0] * (len(b) + 1)
    for word in a:
        row = _next_row(row, word, b)
    common = row[-1]
    scores.append(2 * common / (len(a) + len(b)) if common else 0.0)
    return math.prod(scores) ** (1 / 3)


def _grams(words: list[str], size: int) -> Counter[Any]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _next_row(row: list[int], word: str, others: list[str]) -> list[int]:
    """Lengths of the longest common subsequences with each beginning of `others`, one word later."""
    new = [0]
    for index, other in enumerate(others):
        new.append(row[index] + 1 if word == other else max(row[index + 1], new[-1]))
    return new


def _f_measure(a: Counter[Any], b: Counter[Any]) -> float:
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


SETTLED: dict[str, Callable[[str], Any]] = {
    "tpo": lambda text: re.search("[ABCD]", text),
    "quality": lambda text: re.search("[ABCD]", text),
    "sci_fi": lambda text: re.search(r"(true|false)\S*\s", text.lower()),
}
"""Whether what is written decides the score, so that no more has to be."""


@dataclass(frozen=True)
class Options:
    """How a file is asked.

    Attributes:
        length: of documents, in tokens.
        official: see [`prompt`].
        predictions: folder for what is written, in L-Eval's format.
        limit: number of documents. Default: all.
        questions: number of questions about each. Default: all.
        max_new_tokens: the most that is written. Default: 512.
    """

    length: int
    official: bool
    predictions: Path
    limit: int | None = None
    questions: int | None = None
    max_new_tokens: int = 512


def measure(model: Any, tokenizer: Any, file: Path, options: Options, name: str) -> Result:
    """Ask the questions of a file of L-Eval, whose name is the task's; every document is a draw.

    Raises:
        ValueError: the file is not in its format, or has no question with a score of its own.
    """
    task = task_of(file)
    records = read_json_lines(file, ("instructions", "outputs", "input", "evaluation"))
    records = [record for record in records if record["evaluation"] in ("exam", "f1", "rouge")][: options.limit]
    if not records:
        raise ValueError(f"{file} has no document that is scored by exam, f1 or rouge; the others need a judge.")
    scores, lines = [], []
    with evaluating(model), torch.no_grad():
        for group, record in enumerate(tqdm(records, desc=task, unit="document")):
            writer = Writer(model, tokenizer, task, options.max_new_tokens)
            document = cut(tokenizer, record["input"], options.length, task == "codeU")
            pairs = [*zip(record["instructions"], record["outputs"], strict=True)]
            for question, answer in pairs[: options.questions]:
                written = writer.write(prompt(tokenizer, task, document, question, answer, options.official))
                if task == "sci_fi":
                    about_the_world = question.replace(_OF_THE_DOCUMENT, _OF_THE_WORLD) + "\nAnswer:"
                    written += f" [fact: {writer.write(_ids(tokenizer, about_the_world))}]"
                rule = {"f1": f1, "rouge": rouge}.get(record["evaluation"])
                score = rule(written, answer) if rule else score_closed(task, written, answer)
                scores.append(Score(group, options.length, None, score, math.nan, math.nan))
                line = {"query": question, "gt": answer, f"{name}_pred": written, "evaluation": record["evaluation"]}
                lines.append(json.dumps(line))
    options.predictions.mkdir(parents=True, exist_ok=True)
    (options.predictions / f"{task}.pred.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Result(task=task, unit="tokens", model=name, seed=0, scores=tuple(scores))


def task_of(file: Path) -> str:
    """`coursera` of `coursera.jsonl` or `leval-coursera.jsonl.gz`."""
    return file.name.partition(".")[0].removeprefix("leval-")


class Writer:
    """Writes greedily after prompts that begin alike, and no more than the score needs."""

    def __init__(self, model: Any, tokenizer: Any, task: str, max_new_tokens: int):
        self.reader, self.tokenizer, self.max_new_tokens = Reader(model), tokenizer, max_new_tokens
        self.settled = SETTLED.get(task, lambda text: None)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def write(self, ids: list[int]) -> str:
        def is_enough(written: list[int]) -> bool:
            return bool(self.settled(self.tokenizer.decode(written)))

        written = self.reader.write(ids, self.max_new_tokens, self.ends, is_enough)
        return str(self.tokenizer.decode(written, skip_special_tokens=True))
