"""Runs the Python blocks of Markdown files, as a reader would, on a tiny random model.

    python docs/run_snippets.py README.md docs/index.md

The blocks of a file that are fenced as `python` run one after the other, in one namespace and an empty folder. The
models that they name by their ids on the Hub are replaced by a random one of 2 layers, which needs no network.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+-(?:Instruct|hf)\b")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


def save_random_model(folder: Path) -> None:
    """A Llama of 2 layers with a tokenizer of bytes and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=8192
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def blocks_of(file: Path) -> list[tuple[int, str]]:
    """The Python blocks of a Markdown file, each with the line that it begins at."""
    text = file.read_text(encoding="utf-8")
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in BLOCK.finditer(text)]


def run(file: Path, model: Path, folder: Path) -> int:
    """Run the blocks of `file` in `folder`, with the model at `model`, and return how many there are."""
    blocks = blocks_of(file)
    namespace = {"__name__": "__main__"}
    with _inside(folder):
        for line, source in blocks:
            # Lines in tracebacks are those of the file.
            code = compile("\n" * line + MODEL_ID.sub(str(model), source), str(file), "exec")
            exec(code, namespace)
    return len(blocks)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        save_random_model(Path(top, "model"))
        for number, name in enumerate(sys.argv[1:]):
            Path(top, str(number)).mkdir()
            print(f"{name}: {run(Path(name).resolve(), Path(top, 'model'), Path(top, str(number)))} blocks ran")
