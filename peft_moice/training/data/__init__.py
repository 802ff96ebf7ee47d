"""From files and data sets to the sequences that routers are trained on.

[`load_examples`] reads and encodes what [`DataArguments`] name, and [`make_collator`] makes batches of it.
"""

from .arguments import DataArguments
from .collator import make_collator
from .documents import document_chats
from .examples import Example, load_examples, pack, plain_text
from .sequences import encode_chat, encode_text
from .sources import Source, read_source, read_text

__all__ = [
    "DataArguments",
    "Example",
    "Source",
    "document_chats",
    "encode_chat",
    "encode_text",
    "load_examples",
    "make_collator",
    "pack",
    "plain_text",
    "read_source",
    "read_text",
]
