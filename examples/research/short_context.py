"""Is short-context ability unchanged? Questions of L-Eval without their documents, and the exams over short documents.

    python examples/research/short_context.py --model FOLDER --data FOLDER --out FILE
    python examples/research/short_context.py --model FOLDER --data FOLDER --out FILE --adapter FOLDER
    python examples/research/short_context.py --model FOLDER --data FOLDER --out FILE --method routers --load FILE

`--data` holds `leval-coursera.jsonl.gz`, `leval-tpo.jsonl.gz` and `leval-sci_fi.jsonl.gz`; `--load` is what
`compare.py --method routers --save FILE` wrote. One line of JSON a run. All models get the same questions. Frozen
linear layers multiply in bfloat16, everything else is float32; `--float32` for all of it.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import trained
from compare import command
from exams import Exam
from models import halve

from peft_moice.evaluation import Result, evaluate
from peft_moice.evaluation.losses import token_losses
from peft_moice.probing.evaluation_mode import evaluating

FILES = ("coursera", "tpo", "sci_fi")


def main(args: argparse.Namespace) -> None:
    model, tokenizer = trained.load(args)
    if not args.float32:
        halve(model)
    record: dict = {"model": trained.named(args), "seed": args.seed, "float32": args.float32}
    for name in FILES:
        exam = Exam(args.data / f"leval-{name}.jsonl.gz", tokenizer)
        alone, tokens = question_loss(model, tokenizer, exam, args.questions, args.seed)
        result = evaluate(model, tokenizer, exam, lengths=[args.length], num_groups=args.documents, seed=args.seed)
        record[name] = {"question_loss": alone, "question_tokens": tokens, **exam_scores(result)}
        print(f"{record['model']}: {name} {record[name]}", flush=True)
    record["command"] = " ".join(["python examples/research/short_context.py", *command(sys.argv[1:])])
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def question_loss(model: torch.nn.Module, tokenizer, exam: Exam, number: int, seed: int) -> tuple[float, int]:
    """Mean loss, in nats a token, of questions with their choices and right answers, each read on its own without a
    document; and the number of tokens that it is the mean of.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        exam: where the questions come from.
        number: of questions, drawn without repetition; all if there are fewer.
        seed: of the draw. Default of the script: 0.
    """
    questions = [question for _, asked in exam.documents for question in asked]
    drawn = random.Random(seed).sample(questions, min(number, len(questions)))
    total, tokens = 0.0, 0
    with evaluating(model):
        for question, answer, _ in drawn:
            text = f"{question}\nThe answer is {answer}"
            losses = token_losses(model, torch.tensor(tokenizer(text, verbose=False)["input_ids"]))
            total, tokens = total + losses.sum().item(), tokens + len(losses)
    return total / tokens, tokens


def exam_scores(result: Result) -> dict:
    """Accuracy of the exam with its interval, and loss of the right choice."""
    return {
        "accuracy": result.mean(),
        "interval": result.interval(),
        "answer_loss": result.mean("loss"),
        "questions": len(result.scores),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--questions", type=int, default=50, help="questions of each file, read without a document")
    parser.add_argument("--documents", type=int, default=5, help="documents of each file, with all of their questions")
    parser.add_argument("--length", type=int, default=512, help="tokens that a document is cut to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    main(parser.parse_args())
