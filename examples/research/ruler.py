"""The tasks of RULER (Hsieh et al., COLM 2024) that need no download, by EleutherAI's lm-evaluation-harness.

    pip install lm_eval wonderwords nltk scipy
    python examples/research/ruler.py --model FOLDER --lengths 2048 4096 --limit 20 --out ruler.json
    python examples/research/ruler.py --model FOLDER --adapter FOLDER --out ruler.json
    python examples/research/ruler.py --model FOLDER --method routers --load FILE --out ruler.json

`--load` is what `compare.py --method routers --save FILE` wrote. Every task and length draws its questions from the
same seed, whatever else is asked, so models can be compared question by question. Prompts are in the tokenizer's chat
template if it has one. Lengths count the prompt's tokens and those that may be written, as RULER does, without the
template. Frozen linear layers multiply in bfloat16, everything else is float32; `--float32` for all of it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before anything of the harness is imported: its data are made here, and nothing is to wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trained
from compare import command
from models import halve

from peft_moice.evaluation import bootstrap_interval, wilson_interval

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""A number in a text that repeats itself; a number, and a UUID, in nothing but needles; a chain of variables; the ten
most common words; the three most frequent coded words."""


def main(args: argparse.Namespace) -> None:
    if unknown := set(args.tasks) - set(TASKS):
        raise ValueError(f"--tasks names {sorted(unknown)}; choose among {', '.join(TASKS)}.")
    model, tokenizer = trained.load(args)
    record: dict = {
        "model": trained.named(args),
        "limit": args.limit,
        "float32": args.float32,
        "command": " ".join(["python examples/research/ruler.py", *command(sys.argv[1:])]),
        "tasks": {},
    }
    options = {"batch_size": args.batch_size, "half": not args.float32}
    for name, length, cell in ruler(model, tokenizer, args.model, args.tasks, args.lengths, args.limit, **options):
        record["tasks"].setdefault(name, {})[str(length)] = cell
        args.out.write_text(json.dumps(record, indent=2) + "\n")
        low, high = cell["interval"]
        seconds = f"{cell['cpu_seconds']} s of CPU"
        print(f"{name:<18}{length:>7}  {cell['score']:.3f} ({low:.3f} to {high:.3f})  {seconds}", flush=True)


def ruler(
    model: torch.nn.Module,
    tokenizer: object,
    folder: str,
    tasks: list[str],
    lengths: list[int],
    limit: int,
    *,
    batch_size: int = 1,
    half: bool = False,
) -> Iterator[tuple[str, int, dict]]:
    """Task, length and what the model scored: the share of the answers that its text contains, mean over `limit`
    questions with its 95% interval; the score of each question; processor seconds.

    Args:
        model: measured as it is.
        tokenizer: its tokenizer.
        folder: from which the tasks load the same tokenizer, to fit their texts to the lengths.
        tasks: names, see [`TASKS`].
        lengths: of prompts and answers, in tokens.
        limit: questions of each task and length, at most 500.
        batch_size: questions that are answered at once. Default: 1.
        half: whether frozen linear layers multiply in bfloat16 from then on. Default: False.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Longer than any prompt in its template: the harness cuts what is longer than the model's window.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max(lengths) + 512)
    if half:  # not before: the harness ties weights
        halve(model)
    definitions = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    for name in tasks:
        for length in lengths:
            start = time.process_time()
            metadata = {"max_seq_lengths": [length], "pretrained": folder}
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=[name],
                limit=limit,
                apply_chat_template=bool(tokenizer.chat_template),
                # The harness's thousands of other tasks would take longer to read than a task to run.
                task_manager=TaskManager(metadata=metadata, include_path=str(definitions), include_defaults=False),
                metadata=metadata,
                bootstrap_iters=0,
            )
            answered = [sample[str(length)] for sample in results["samples"][name]]
            cell = {
                "score": sum(answered) / len(answered),
                "interval": interval(answered),
                "scores": answered,
                "cpu_seconds": round(time.process_time() - start),
            }
            yield name, length, cell


def interval(scores: list[float]) -> tuple[float, float]:
    """Wilson's for questions that are right or wrong, a bootstrap for shares of several answers."""
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_interval([[score] for score in scores])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--limit", type=int, default=20, help="questions of each task and length")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path)
    main(parser.parse_args())
