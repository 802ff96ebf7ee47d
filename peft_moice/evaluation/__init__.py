"""Does a model find a fact wherever it stands in its prompt, and what does ordinary text cost it?

Works on any causal language model of transformers, adapted or not.
"""

from .facts import EncodedChat, FactList, encode_chat, sample_facts
from .intervals import wilson_interval
from .perplexity import perplexity
from .sweep import PositionSweep, position_sweep

__all__ = [
    "EncodedChat",
    "FactList",
    "PositionSweep",
    "encode_chat",
    "perplexity",
    "position_sweep",
    "sample_facts",
    "wilson_interval",
]
