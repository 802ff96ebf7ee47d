"""Needles in a haystack of one's own text, by the definitions of RULER (Hsieh et al., COLM 2024)."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from ..training.data.sequences import check_fast
from .task import Example, Scoring

Kind = Literal["single", "keys", "values", "variables"]

_KEYS = """
    anchor bridge candle castle copper desert engine falcon forest garden hammer harbor island jacket kettle ladder
    lantern magnet marble meadow mirror needle orchard paddle palace pepper pillow planet pocket rabbit ribbon saddle
    shadow shovel signal silver spider spring stable statue summer ticket timber tunnel turtle valley velvet violin
    walnut window winter
""".split()  # noqa: SIM905
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERS = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{text}\n"
    "What are all the special magic numbers for {asked} mentioned in the provided text?"
)
_NUMBER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{text}\nWhat is the special magic number for {asked} mentioned in the provided text?"
)
_VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"
    "Question: Find all variables that are assigned the value {asked} in the text above."
)
_NUMBERS_OPENING = "The special magic numbers for {asked} mentioned in the provided text are "
_NUMBER_OPENING = "The special magic number for {asked} mentioned in the provided text is "
_VARIABLES_OPENING = (
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
    "{asked}, they are: "
)
_NOISE = [
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
]  # fmt: skip
_OTHERS = 3
_HOPS = 4
_MAX_WORDS = 40


class Needles:
    """Sentences hidden in a text, and a question about them.

    Kinds, with RULER's numbers and in its words:

    - "single" (`niah_single`): one number of a key is hidden and asked for;
    - "keys" (`niah_multikey`): three numbers of other keys are hidden beside it;
    - "values" (`niah_multivalue`): four numbers of one key are hidden, and all of them asked for;
    - "variables" (`ruler_vt`): `VAR A = 12345`, `VAR B = VAR A`, ... with four hops; asked for are the five variables
      that have the value. An example with other variables and its answer stands before the text.

    With the first two kinds an answer is right if the model's text begins with it, stricter than RULER, which looks
    for it in 128 tokens; with the others the score is RULER's, the share of the answers that the text contains.

    The position is that of the needle that is asked for, with "values" and "variables" of the first one; the others
    stand at random places, with "variables" behind it and in order. (RULER draws all places at random, which the mean
    over positions approaches for the first two kinds only.)

    Args:
        text: the haystack, at least as long as the longest prompt.
        tokenizer: counts the tokens of its sentences, a fast one.
        kind: see above. Default: "single".

    Raises:
        ValueError: the text has no sentences, an unknown kind, or a slow tokenizer.
    """

    unit = "tokens"

    def __init__(self, text: str, tokenizer: Any, kind: Kind = "single"):
        if kind not in ("single", "keys", "values", "variables"):
            raise ValueError(f"`kind` is {kind!r}; choose 'single', 'keys', 'values' or 'variables'.")
        check_fast(tokenizer)
        self.kind = kind
        self.name = f"needles: {kind}"
        self.scoring: Scoring = "all" if kind in ("values", "variables") else "exact"
        self.sentences = _pieces(text)
        if not self.sentences:
            raise ValueError("The text is empty. Give a text that needles can be hidden in.")
        encoded = tokenizer(self.sentences, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokens = [len(ids) for ids in encoded]

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """See [`Task.draw`]. `length` counts the haystack's tokens, up to the end of a sentence or line.

        Latest positions come first, because prompts begin alike up to the first needle.
        """
        haystack = self._haystack(rng, length)
        if self.kind == "variables":
            example, needles, answers = _chains(rng)
            frame, opening = _VARIABLES, _VARIABLES_OPENING
            asked = needles[0].split()[-1].rstrip(".")
        else:
            example, frame = "", _NUMBERS if self.kind == "values" else _NUMBER
            opening = _NUMBERS_OPENING if self.kind == "values" else _NUMBER_OPENING
            needles, answers, asked = _numbers(rng, self.kind)
        # The same places of the other needles for all positions.
        others = [rng.random() for _ in needles[1:]]
        examples = []
        for position in sorted(positions, reverse=True):
            if self.kind == "variables":
                places = [position, *sorted(position + (1 - position) * other for other in others)]
            else:
                places = [position, *others]
            shown = list(haystack)
            by_place = sorted(enumerate(places), key=lambda pair: (pair[1], pair[0]), reverse=True)
            for index, relative in by_place:
                shown.insert(round(relative * len(haystack)), needles[index])
            prompt = example + frame.format(text=" ".join(shown), asked=asked)
            examples.append(Example(prompt, answers, position, length, opening=opening.format(asked=asked)))
        return examples

    def _haystack(self, rng: random.Random, length: int) -> list[str]:
        total = sum(self.tokens)
        if total < length:
            raise ValueError(f"The text has {total} tokens, fewer than the haystack's {length}. Give more text.")
        # From a sentence on, round the end of the text.
        index = rng.randrange(len(self.sentences))
        chosen, tokens = [], 0
        while tokens < length:
            chosen.append(self.sentences[index])
            tokens += self.tokens[index]
            index = (index + 1) % len(self.sentences)
        return chosen


def _pieces(text: str) -> list[str]:
    """Sentences or lines of a text, in pieces of at most `_MAX_WORDS` words (a table may have no sentence)."""
    parts = (part.split() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", text))
    return [
        " ".join(words[start : start + _MAX_WORDS]) for words in parts for start in range(0, len(words), _MAX_WORDS)
    ]


def _numbers(rng: random.Random, kind: Kind) -> tuple[list[str], tuple[str, ...], str]:
    """Needles, the asked one first; answers; the key that is asked for."""
    key, *other_keys = rng.sample(_KEYS, 1 + (_OTHERS if kind == "keys" else 0))
    values = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), 1 + _OTHERS)]
    keys = [key] * len(values) if kind == "values" else [key, *other_keys]
    needles = [
        f"One of the special magic numbers for {name} is: {value}." for name, value in zip(keys, values, strict=False)
    ]
    return needles, tuple(values) if kind == "values" else (values[0],), key


def _chains(rng: random.Random) -> tuple[str, list[str], tuple[str, ...]]:
    """An example, complete with its answer; needles in order; answers."""
    shown, shown_names = _chain(rng, 3)
    sentences = _NOISE * 2
    for place, assignment in reversed(list(zip(sorted(rng.sample(range(10), 5)), shown, strict=True))):
        sentences.insert(place, assignment)
    value = shown[0].split()[-1].rstrip(".")
    example = _VARIABLES.format(text=" ".join(sentences), asked=value)
    example += f"\n{_VARIABLES_OPENING.format(asked=value)}{', '.join(shown_names)}\n\n"
    return example, *_chain(rng, 5)


def _chain(rng: random.Random, letters: int) -> tuple[list[str], tuple[str, ...]]:
    """Assignments in order, and the variables that they assign to."""
    names: dict[str, None] = {}
    while len(names) < 1 + _HOPS:
        names["".join(rng.choices(_LETTERS, k=letters))] = None
    variables = tuple(names)
    first = f"VAR {variables[0]} = {rng.randint(10_000, 99_999)}."
    return [first, *(f"VAR {new} = VAR {old}." for old, new in pairwise(variables))], variables
