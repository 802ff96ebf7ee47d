"""What happens to running text beyond the window that a model was trained on? Loss by position in long documents.

    python examples/research/beyond.py --model FOLDER --data FOLDER --out FILE
    python examples/research/beyond.py --model FOLDER --data FOLDER --out FILE --method routers --load FILE

`--data` holds `leval-sci_fi.jsonl.gz`; `--load` is what `compare.py --method routers --save FILE` wrote. One line of
JSON a run. Frozen linear layers multiply in bfloat16, everything else is float32; `--float32` for all of it.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import torch
import trained
from compare import command
from models import halve

from peft_moice.evaluation.losses import token_losses
from peft_moice.probing.evaluation_mode import evaluating


def main(args: argparse.Namespace) -> None:
    model, tokenizer = trained.load(args)
    if not args.float32:
        halve(model)
    chunks = long_documents(tokenizer, args.data / "leval-sci_fi.jsonl.gz", args.edges[-1], args.documents)
    with evaluating(model):
        losses = torch.stack([token_losses(model, chunk) for chunk in chunks]).mean(dim=0)
    starts = (0, *args.edges[:-1])
    # The loss at index i is that of the token at i + 1.
    by_position = {
        f"{start} to {end}": losses[max(start - 1, 0) : end - 1].mean().item()
        for start, end in zip(starts, args.edges, strict=True)
    }
    record = {
        "model": trained.named(args),
        "documents": len(chunks),
        "float32": args.float32,
        "losses": by_position,
        "command": " ".join(["python examples/research/beyond.py", *command(sys.argv[1:])]),
    }
    print(f"{record['model']}: {by_position}", flush=True)
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def long_documents(tokenizer, file: Path, length: int, number: int) -> torch.Tensor:
    """The first `length` tokens of each of the first `number` documents that have so many, `[number, length]`.

    Raises:
        ValueError: no document has.
    """
    texts: dict[str, None] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.setdefault(json.loads(line)["input"])
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length and len(found) < number:
            found.append(ids[:length])
    if not found:
        raise ValueError(f"No document of {file.name} has {length} tokens; lower the last of `--edges`.")
    return torch.tensor(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--edges", nargs="+", type=int, default=[2048, 4096, 8192, 10240, 12288], help="ends of spans")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--out", required=True, type=Path)
    main(parser.parse_args())
