"""Sequences for train_router.py: from chats, plain text, or questions made up about documents."""

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jinja2 import TemplateError
from loading import read_text
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """What to read and how."""

    train_files: list[str] = field(metadata={"help": "Files to train on."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Files to measure the loss on."})
    data_format: Literal["messages", "prompt_answer", "text", "documents"] = field(
        default="messages", metadata={"help": "What the files hold."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Jinja file, in place of the tokenizer's."})
    loss_on: Literal["answers", "all"] = field(
        default="answers", metadata={"help": "Learn answers only, or prompts too. Plain text is learned whole."}
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


Example = list[dict[str, list[int]]]
"""What one row of a batch is made of: `input_ids` and `labels` of one sequence, or of several packed ones."""


def load_examples(files: list[str], tokenizer, args: DataArguments, seed: int, quiet: bool) -> list[Example]:
    """Read and encode files.

    Raises:
        ValueError: a file is not in its format (naming file, line and reason), or nothing is left to train on.
    """
    if not files:
        return []
    if args.data_format == "text":
        sequences = [sequence for file in files for sequence in encode_text(file, tokenizer, args.max_length)]
    else:
        if args.data_format == "documents":
            chats = list(document_chats(files, args, seed))
        else:
            chats = [chat for file in files for chat in read_chats(file, args.data_format)]
        sequences = [
            encode_chat(where, messages, tokenizer, args.loss_on)
            for where, messages in tqdm(chats, desc="encoding", unit="chat", disable=quiet)
        ]
    kept = [sequence for sequence in sequences if len(sequence["input_ids"]) <= args.max_length]
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    if not kept:
        raise ValueError(
            f"{', '.join(files)}: every sequence exceeds --max_length {args.max_length}. The longest has {longest} "
            "tokens; raise --max_length to as many."
        )
    dropped = len(sequences) - len(kept)
    if dropped and args.data_format == "documents":
        raise ValueError(
            f"{', '.join(files)}: {dropped} of {len(sequences)} prompts exceed --max_length {args.max_length}, and "
            "without them not every place would be asked for equally often. Raise --max_length to "
            f"{longest}, or lower --documents_per_prompt or --passage_words."
        )
    if dropped:
        logger.warning(
            "%d of %d chats exceed --max_length %d and are left out; --max_length %d takes all.",
            *(dropped, len(sequences), args.max_length, longest),
        )
    return pack(kept, args.max_length) if args.packing else [[sequence] for sequence in kept]


def read_chats(file: str, data_format: str) -> Iterator[tuple[str, list[dict]]]:
    """Chats and where they stand."""
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty. Give a file of JSON lines, or leave it out.")
    if text.lstrip().startswith("["):
        raise ValueError(
            f"{file}: a JSON array, but --data_format {data_format} needs JSON lines, one object a line. "
            f"`jq -c '.[]' {file}` writes them."
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from None
        wanted = ("messages",) if data_format == "messages" else ("prompt", "answer")
        missing = [name for name in wanted if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r}; --data_format {data_format} needs an object with {wanted}.")
        if data_format == "messages":
            messages = record["messages"]
        else:
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["answer"]},
            ]
        if not isinstance(messages, list) or not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise ValueError(f"{where}: every message needs a 'role' and a 'content', both strings.")
        if messages and messages[0]["role"] == "assistant":
            raise ValueError(f"{where}: the first message is an answer, which needs a prompt before it.")
        if not any(message["role"] == "assistant" and message["content"] for message in messages):
            raise ValueError(f"{where}: there is no answer, which is a message of the role 'assistant' with content.")
        yield where, messages


def encode_chat(where: str, messages: list[dict], tokenizer, loss_on: str) -> dict[str, list[int]]:
    """Token ids and labels; with `loss_on="answers"`, labels only where the assistant speaks."""

    def render(count: int, add_generation_prompt: bool = False) -> str:
        if not tokenizer.chat_template:
            contents = [message["content"] for message in messages[:count]]
            end = (tokenizer.eos_token or "") if count == len(messages) else ""
            return "\n".join(contents) + end + ("\n" if add_generation_prompt else "")
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses this chat: {error}") from None

    text = render(len(messages))
    encoded = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True, verbose=False
    )
    labels = list(encoded["input_ids"])
    if loss_on == "answers":
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(index, add_generation_prompt=True), render(index + 1)
                if not (text.startswith(before) and text.startswith(after)):
                    raise ValueError(
                        f"{where}: the chat template writes message {index} differently when others follow, so "
                        "answers cannot be told from prompts. Use --loss_on all, chats of one answer, or another "
                        "--chat_template."
                    )
                spans.append((len(before), len(after)))
        labels = [
            token if any(start < token_end and token_start < end for start, end in spans) else -100
            for token, (token_start, token_end) in zip(labels, encoded["offset_mapping"], strict=True)
        ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def encode_text(file: str, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Consecutive sequences of a file, the last one as short as it comes out."""
    tokens = tokenizer(read_text(file), verbose=False)["input_ids"]
    chunks = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    if not chunks:
        raise ValueError(f"{file}, line 1: there is no text.")
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]


OPENING_WORDS = 4
"""Words of a sentence that a question quotes."""


def document_chats(files: list[str], args: DataArguments, seed: int) -> Iterator[tuple[str, list[dict]]]:
    """Chats that show passages and ask for sentences of them.

    Over `documents_per_prompt` chats in a row, every place in the prompt is asked for equally often.
    """
    number = args.documents_per_prompt
    if not 1 <= args.questions <= number:
        raise ValueError(f"--questions is {args.questions}, but has to lie in 1..{number}, --documents_per_prompt.")
    passages = [passage for file in files for passage in read_passages(file, args.passage_words)]
    if len(passages) < number:
        raise ValueError(
            f"{', '.join(files)}: {len(passages)} passages of {args.passage_words} words with a sentence to ask for, "
            f"too few for --documents_per_prompt {number}. Give more text, or lower one of the two."
        )
    rng = random.Random(seed)
    for index in range(args.prompts):
        places = [(index + turn * number // args.questions) % number for turn in range(args.questions)]
        for _ in range(100):
            shown = rng.sample(passages, number)
            askable = [unique_sentences(shown, place) for place in places]
            if all(askable):
                break
        else:
            raise ValueError(f"{', '.join(files)}: passages repeat each other, so questions would be ambiguous.")
        prompt = "\n\n".join(f"Document {i + 1}: {' '.join(sentences)}" for i, sentences in enumerate(shown))
        messages = []
        for turn, sentences in enumerate(askable):
            answer = rng.choice(sentences)
            question = f'Repeat the sentence that starts with "{opening(answer)}".'
            messages.append({"role": "user", "content": question if turn else f"{prompt}\n\n{question}"})
            messages.append({"role": "assistant", "content": answer})
        yield f"prompt {index} made of {', '.join(files)}", messages


def read_passages(file: str, words: int) -> list[list[str]]:
    """Disjoint passages of a text, as lists of sentences, one of them at least long enough to be asked for."""
    passages, passage = [], []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", read_text(file)):
        if sentence.strip():
            passage.append(" ".join(sentence.split()))
        if sum(len(part.split()) for part in passage) >= words:
            passages.append(passage)
            passage = []
    return [passage for passage in [*passages, passage] if any(map(is_askable, passage))]


def is_askable(sentence: str) -> bool:
    return OPENING_WORDS + 2 <= len(sentence.split()) <= 60


def opening(sentence: str) -> str:
    return " ".join(sentence.split()[:OPENING_WORDS])


def unique_sentences(passages: list[list[str]], place: int) -> list[str]:
    """Sentences of the passage at `place` that no other sentence of `passages` starts like."""
    counts = Counter(opening(sentence) for passage in passages for sentence in passage)
    return [sentence for sentence in passages[place] if is_askable(sentence) and counts[opening(sentence)] == 1]


def pack(sequences: list[dict[str, list[int]]], max_length: int) -> list[Example]:
    """Neighbors together as long as they fit into `max_length` tokens."""
    packed, free = [], 0
    for sequence in sequences:
        length = len(sequence["input_ids"])
        if length > free:
            packed.append([])
            free = max_length
        packed[-1].append(sequence)
        free -= length
    return packed


class Collator:
    """Pads on the right; packed examples become one row of sequences that do not see each other.

    transformers tells packed sequences apart by positions that start again at 0, where there is no attention mask.
    """

    def __init__(self, tokenizer):
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        if any(len(example) > 1 for example in examples):
            row = [sequence for example in examples for sequence in example]
            return {
                "input_ids": torch.tensor([[token for sequence in row for token in sequence["input_ids"]]]),
                # Nothing predicts the first token of a sequence.
                "labels": torch.tensor([[label for sequence in row for label in [-100, *sequence["labels"][1:]]]]),
                "position_ids": torch.tensor([[i for sequence in row for i in range(len(sequence["input_ids"]))]]),
            }
        lengths = [len(sequence["input_ids"]) for (sequence,) in examples]

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([seq[name] + [filler] * (max(lengths) - len(seq[name])) for (seq,) in examples])

        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", -100),
            "attention_mask": mask.long(),
        }
