"""Runs the Python blocks of Markdown files, as a reader would, on a tiny random model.

    python .ci/run_snippets.py README.md docs/index.md
    python .ci/run_snippets.py --commands README.md

The blocks of a file that are fenced as `python` run one after the other, in one namespace and an empty folder. With
`--commands`, lines of `peft-moice` in blocks of the shell run instead, on little data. The models that are named by
their ids on the Hub are replaced by a random one of 2 layers, which needs no network.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+-(?:Instruct|hf)\b")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEWER = {
    "measure": ["--items", "4", "--lengths", "64", "--questions", "1"],
    "train": ["--max_steps", "2", "--max_length", "8192", "--prompts", "4", "--use_cpu", "--overwrite"],
}
"""What makes commands quick, and lets trainings that stand there as alternatives follow each other in one folder."""
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


def commands_of(file: Path) -> list[list[str]]:
    """The words of the command lines of this package in a Markdown file, from the command's name on."""
    lines = "\n".join(SHELL_BLOCK.findall(file.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["peft-moice"]:
            found.append(words[1:])
        elif "peft_moice" in words:
            found.append(words[words.index("peft_moice") + 1 :])
    return found


def run_commands(file: Path, model: Path, folder: Path) -> int:
    """Run the commands of `file` in `folder`, with the model at `model`, and return how many there are.

    Raises:
        CalledProcessError: one fails.
    """
    (folder / "notes").mkdir()
    for number in range(2):
        text = " ".join(f"Room {room} of house {number} has {room * 7} chairs." for room in range(400))
        (folder / "notes" / f"{number}.txt").write_text(text)
    turns = [{"role": "user", "content": "What is the code?" * 20}, {"role": "assistant", "content": "It is 4711."}]
    (folder / "chats.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 4))
    commands = commands_of(file)
    for words in commands:
        line = [MODEL_ID.sub(str(model), word) for word in words]
        # What the shell does.
        line = [str(name) for word in line for name in (sorted(folder.glob(word)) if "*" in word else [word])]
        print("peft-moice", *line, flush=True)
        command = [sys.executable, "-m", "peft_moice", *line, *FEWER.get(line[0], [])]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return len(commands)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(arguments: list[str]) -> None:
    runner, what = (run_commands, "commands") if "--commands" in arguments else (run, "blocks")
    with tempfile.TemporaryDirectory() as top:
        model = Path(top, "model")
        save_random_model(model)
        for number, name in enumerate(argument for argument in arguments if argument != "--commands"):
            folder = Path(top, str(number))
            folder.mkdir()
            print(f"{name}: {runner(Path(name).resolve(), model, folder)} {what} ran")


if __name__ == "__main__":
    main(sys.argv[1:])
