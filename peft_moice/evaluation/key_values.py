"""Key-value retrieval: the value of one key of a JSON object ("Lost in the Middle", Liu et al., TACL 2024)."""

import random
from collections.abc import Sequence
from pathlib import Path

from .files import Deck, read_json_lines
from .task import Example, Scoring, place

_PROMPT = """Extract the value corresponding to the specified key in the JSON object below.

JSON data:
{object}

Key: "{key}"
Corresponding value:"""


class KeyValues:
    """Random keys and values of hexadecimal digits, or those of a file of the paper.

    Args:
        digits: digits of a random key or value, 1 to 32. Default: 8; the paper's UUIDs have 32.
        file: a file of `nelson-liu/lost-in-the-middle`, `kv_data/*.jsonl.gz`, in place of random pairs. A prompt shows
            the first `length` pairs of one of its objects, so `length` goes up to the number that they have.

    Raises:
        ValueError: `digits` out of its range, or the file is not in its format.
    """

    name = "key-value retrieval"
    unit = "pairs"
    scoring: Scoring = "exact"

    def __init__(self, digits: int = 8, file: str | Path | None = None):
        if not 1 <= digits <= 32:
            raise ValueError(f"`digits` is {digits}, but has to lie in 1..32.")
        self.digits = digits
        self._objects = None
        if file is not None:
            records = read_json_lines(file, ("ordered_kv_records",))
            self._objects = Deck([record["ordered_kv_records"] for record in records])

    def draw(self, rng: random.Random, length: int, positions: Sequence[float]) -> list[Example]:
        """See [`Task.draw`]. The answer is the value inside its quotes."""
        pairs = self._pairs(rng, length)
        shown = "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"
        examples = []
        for position in positions:
            key, value = pairs[place(position, length)]
            prompt = _PROMPT.format(object=shown, key=key)
            examples.append(Example(prompt, (value,), position, length, opening='"'))
        return examples

    def _pairs(self, rng: random.Random, length: int) -> list[tuple[str, str]]:
        if self._objects is None:
            if length > 16**self.digits:
                raise ValueError(f"There are fewer than {length} keys of {self.digits} digits. Raise `digits`.")
            keys: dict[str, None] = {}
            while len(keys) < length:
                keys[f"{rng.getrandbits(4 * self.digits):0{self.digits}x}"] = None
            return [(key, f"{rng.getrandbits(4 * self.digits):0{self.digits}x}") for key in keys]
        pairs = self._objects.deal(rng)
        if length > len(pairs):
            raise ValueError(f"`length` is {length}, but the file's objects have {len(pairs)} pairs. Lower it.")
        return [(key, value) for key, value in pairs[:length]]
