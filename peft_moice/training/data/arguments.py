"""What is read, and how."""

from dataclasses import dataclass, field
from typing import Literal

DataFormat = Literal["auto", "messages", "sharegpt", "prompt_answer", "question_answer", "alpaca", "text", "documents"]


@dataclass
class DataArguments:
    """Data to train routers on, in the form that `transformers.HfArgumentParser` takes.

    Each field is an argument of `peft-moice train`, whose `--help` says what it is and lists the formats.
    """

    train_files: list[str] = field(metadata={"help": "Files, or data sets of the Hub, to train on."})
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "The same, to measure the loss on with and without routers."}
    )
    data_format: DataFormat = field(default="auto", metadata={"help": "What they hold, see below."})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "NAME=COLUMN, where columns have other names than the format's."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Jinja file, in place of the tokenizer's."})
    loss_on: Literal["answers", "all"] = field(
        default="answers", metadata={"help": "Learn answers only, or prompts too."}
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of a sequence. Longer chats are left out."})
    packing: bool = field(
        default=False,
        metadata={"help": "Fill sequences up to max_length with several chats that do not see each other."},
    )
    documents_per_prompt: int = field(default=10, metadata={"help": "documents: passages in a prompt."})
    passage_words: int = field(default=60, metadata={"help": "documents: words in a passage, about."})
    questions: int = field(default=1, metadata={"help": "documents: questions asked in turn about a prompt."})
    prompts: int = field(default=1000, metadata={"help": "documents: number of prompts to make."})
