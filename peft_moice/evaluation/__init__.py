"""Does a model find what stands in a long prompt, wherever it stands, and what does ordinary text cost it?

A task draws questions, [`evaluate`] asks a model, a [`Result`] holds scores and draws itself. Works on any causal
language model of transformers, adapted or not.
"""

from typing import NoReturn

from .facts import EncodedChat, FactList, Facts, encode_chat, sample_facts
from .gates import gates_along
from .grid import evaluate
from .intervals import bootstrap_interval, wilson_interval
from .key_values import KeyValues
from .losses import PositionLosses, losses_by_position, perplexity
from .multi_document import MultiDocument
from .needles import Needles
from .result import Result, Score
from .task import POSITIONS, Example, Task

__all__ = [
    "POSITIONS",
    "EncodedChat",
    "Example",
    "FactList",
    "Facts",
    "KeyValues",
    "MultiDocument",
    "Needles",
    "PositionLosses",
    "Result",
    "Score",
    "Task",
    "bootstrap_interval",
    "encode_chat",
    "evaluate",
    "gates_along",
    "losses_by_position",
    "perplexity",
    "sample_facts",
    "wilson_interval",
]

_GONE = {
    "position_sweep": "Call `evaluate(model, tokenizer, Facts(), lengths=[num_facts], num_groups=num_lists)`.",
    "PositionSweep": "`evaluate` returns a `Result`, which has the same means and intervals.",
    "perplexities": "Call `perplexity` once for each `chunk_length`.",
    "Exam": "A task is a class with `name`, `unit`, `scoring` and `draw`; examples/research/exams.py has this one.",
}


def __getattr__(name: str) -> NoReturn:
    if name in _GONE:
        raise ImportError(f"`{__name__}.{name}` is no longer here. {_GONE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
