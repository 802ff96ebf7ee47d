"""Does a model find what stands in a long prompt, wherever it stands, and what does ordinary text cost it?

A task draws questions, [`evaluate`] asks a model, a [`Result`] holds scores and draws itself. Works on any causal
language model of transformers, adapted or not.
"""

from ..training.data.facts import FactList, sample_facts
from .explaining import gates_along
from .facts import EncodedChat, Facts, encode_chat
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
