"""What the command line asks for: train, measure, log, draw."""

import argparse
import copy
import hashlib
import re
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import answer
import from_scratch
import hours
import leval
import log
import made
import mdqa
import settings
import tables
import torch
import training
from estimate_scale import SHAPES
from huggingface_hub import hf_hub_download
from loading import load_model
from models import number_of_parameters
from peft import PeftModel
from peft.utils import CONFIG_NAME
from settings import METHODS, TRAINED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_moice.evaluation import Result
from peft_moice.tuner.extending import window_of

CHATS = Path(__file__).parents[2] / "data" / "facts.jsonl"
SMALL_TASKS = (*leval.CLOSED, "financial_qa", "gov_report_summ")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python examples/research/paper", description=__doc__)
    parser.add_argument("table", choices=("training", "leval", "mdqa", "from_scratch", "answer", "hours", "tables"))
    parser.add_argument("--model", help="folder, Hub id, llama2, mistral or qwen; with --small SmolLM2-135M")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--recipe", choices=settings.RECIPES, default="released", help="the script's or the text's")
    parser.add_argument("--angles", nargs="+", type=float, help="multiples of the own base; default: the settings'")
    parser.add_argument("--train_files", nargs="+", help="as for peft-moice train; default: OpenHermes")
    parser.add_argument("--data", type=Path, help="folder with files of L-Eval and of lost-in-the-middle")
    parser.add_argument("--tasks", nargs="+", help="of L-Eval, by the names of its files; default: the closed ones")
    parser.add_argument("--questions", type=int, default=500, help="of lost-in-the-middle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few items in a few minutes, on a CPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper"))
    args = parser.parse_args(argv)
    if args.model is None and not args.small and args.table not in ("from_scratch", "hours", "tables"):
        parser.error("name the model with --model; --small has a default.")
    args.model = args.model and settings.model_named(args.model).name
    args.log = args.output_dir / "log.jsonl"
    args.folder = args.output_dir / re.sub(r"\W+", "-", args.model or "SmolLM2-135M-Instruct").strip("-")
    return args


def main(args: argparse.Namespace) -> None:
    if args.table == "hours":
        config = AutoConfig.from_pretrained(args.model) if args.model else None
        print(hours.report(hours.shape_of(config), window_of(config)) if config else hours.report(SHAPES[0], 4096))
        return
    commands = {
        "training": train_all,
        "leval": measure,
        "mdqa": measure,
        "from_scratch": scratch,
        "answer": find_answer,
    }
    if args.table != "tables":
        commands[args.table](args)
    for table in tables.COLUMNS:
        rows = tables.rows_of(table, log.read(args.log))
        tables.write(rows, args.output_dir / table)
        if args.table in (table, "tables"):
            print(tables.markdown(tables.without_empty(rows)))


load_once = cache(load_model)
"""For small models: unpacking the default one takes longer than asking it."""


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """A fresh model and its tokenizer."""
    if args.small:
        model, tokenizer = copy.deepcopy(load_once(args.model))
    else:
        on_gpu = torch.cuda.is_available()
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
        model, tokenizer = model.to("cuda" if on_gpu else "cpu"), AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(args.seed)
    return model, tokenizer


def record_of(args: argparse.Namespace, method: str, task: str, **values: Any) -> dict[str, Any]:
    """A line of the log."""
    what = {"table": args.table, "model": args.model or "SmolLM2-135M-Instruct", "method": method, "task": task}
    is_trained = method == "moice" and args.table in ("leval", "mdqa", "training")
    recipe = " ".join([args.recipe, *map(str, args.angles or ())]) if is_trained else None
    return {**what, "recipe": recipe, "seed": args.seed, "small": args.small, **values}


def options_of(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Options of a method for this model."""
    model, options = settings.model_named(args.model or ""), dict(METHODS[method][1])
    if method in ("moice", "attention_buckets"):
        options["multipliers"] = args.angles or list(model.angles[: settings.SMALL_ANGLES if args.small else None])
    if method == "moice":
        options |= settings.RECIPES[args.recipe]
    return options


def ready(args: argparse.Namespace, method: str) -> tuple[Any, Any]:
    """A method's model, trained if it has to be, and its tokenizer."""
    model, tokenizer = load(args)
    if method not in TRAINED:
        return training.make(METHODS[method][0], model, tokenizer, options_of(args, method)), tokenizer
    parts = [method, args.recipe, *map(str, args.angles or ()), f"seed{args.seed}", *["small"] * args.small]
    folder = args.folder / "_".join(parts)
    if not (folder / CONFIG_NAME).is_file():
        made_model = training.make(METHODS[method][0], model, tokenizer, options_of(args, method))
        words = [*settings.TRAINING, "--seed", str(args.seed), "--output_dir", str(folder), "--train_files"]
        words += args.train_files or ([str(CHATS)] if args.small else [settings.TRAINING_DATA])
        words += settings.SMALL_TRAINING if args.small else []
        if args.recipe == "released" and settings.model_named(args.model or "").official_prompt:
            template = args.folder / "script.jinja"
            args.folder.mkdir(parents=True, exist_ok=True)
            template.write_text(settings.SCRIPT_TEMPLATE)
            words += ["--chat_template", str(template)]
        parameters, start = number_of_parameters(made_model), time.perf_counter()
        training.train(made_model, tokenizer, words)
        about = {"parameters": parameters, "seconds": round(time.perf_counter() - start), "options": words}
        log.write(args.log, {**record_of(args, method, "training", **about), "table": "training"})
        model, tokenizer = load(args)
    return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer


def train_all(args: argparse.Namespace) -> None:
    for method in (method for method in args.methods if method in TRAINED):
        ready(args, method)


def measure(args: argparse.Namespace) -> None:
    """All tasks of L-Eval or of multi-document questions with each method; what the log has is not asked again."""
    if args.small and args.data is None:
        args.data = made.write(args.output_dir / "made")
    done = {log.key(record) for record in log.read(args.log)}
    for method in args.methods:
        model = None
        tasks = args.tasks or (SMALL_TASKS if args.small else leval.CLOSED)
        if args.table == "mdqa":
            tasks = [f"{documents} documents" for documents in (mdqa.GOLD if not args.small else [10])]
        for task in tasks:
            file = (
                mdqa.find(args.data or Path(), int(task.split()[0])) if args.table == "mdqa" else find_exam(args, task)
            )
            data = f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
            record = record_of(args, method, task, data=data)
            if log.key(record) in done:
                continue
            if model is None:
                model, tokenizer = ready(args, method)
            start = time.perf_counter()
            result = (ask_documents if args.table == "mdqa" else ask_exam)(args, model, tokenizer, file, task, method)
            seconds = round(time.perf_counter() - start)
            log.write(args.log, {**record, "seconds": seconds, "result": log.pack(result)})


def ask_documents(args: argparse.Namespace, model: Any, tokenizer: Any, file: Path, task: str, method: str) -> Result:
    size = {"num_groups": 1, "max_new_tokens": 8} if args.small else {"num_groups": args.questions}
    return mdqa.measure(model, tokenizer, file, int(task.split()[0]), seed=args.seed, name=method, **size)


def ask_exam(args: argparse.Namespace, model: Any, tokenizer: Any, file: Path, task: str, method: str) -> Result:
    official = settings.model_named(args.model or "").official_prompt
    predictions = args.folder / "predictions" / method
    # "4k" is 4,000 tokens in L-Eval, of which 512 are kept for the answer.
    options = leval.Options(window_of(model.config) // 1024 * 1000 - 512, official, predictions)
    if args.small:
        options = leval.Options(400, official, predictions, limit=1, questions=1, max_new_tokens=8)
    return leval.measure(model, tokenizer, file, options, method)


def find_exam(args: argparse.Namespace, task: str) -> Path:
    """A file of L-Eval, of `--data` or else of the Hub.

    Raises:
        ValueError: the folder does not have it.
    """
    folder = args.data
    if folder is None:
        kind = "Exam" if task in leval.CLOSED else "Generation"
        name, revision = settings.LEVAL
        return Path(hf_hub_download(name, f"LEval/{kind}/{task}.jsonl", repo_type="dataset", revision=revision))
    for name in (f"{task}.jsonl", f"leval-{task}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no {task}.jsonl. Name the tasks that it has with --tasks, or leave --data out.")


def scratch(args: argparse.Namespace) -> None:
    args.model = "examples/train_from_scratch.py"
    folder = args.output_dir / "from_scratch"
    for method, values in from_scratch.run(folder, seeds=[args.seed], small=args.small).items():
        log.write(args.log, record_of(args, method, "loss", values=values))


def find_answer(args: argparse.Namespace) -> None:
    """Each method once; the verdict, when all are there."""
    files = answer.write_prompts(args.folder / "prompts", small=args.small, seed=args.seed)
    options = {"small": args.small, "seed": args.seed}
    text, lines = answer.ordinary_text(), {}
    for method in answer.METHODS:
        record = record_of(args, method, "answer")
        known = [line for line in log.read(args.log) if log.key(line) == log.key(record)]
        if not known:
            start = time.perf_counter()
            model, tokenizer, found = answer.train(method, partial(load, args), files, args.folder, **options)
            results, perplexity = answer.measure(model, tokenizer, text, name=method, **options)
            record |= {**found, "perplexity": perplexity, "results": [log.pack(result) for result in results]}
            log.write(args.log, {**record, "seconds": round(time.perf_counter() - start)})
            known = [record]
        lines[method] = known[0]
    results = {method: [log.unpack(result) for result in line["results"]] for method, line in lines.items()}
    verdict = answer.verdict(results, {method: line["perplexity"] for method, line in lines.items()})
    (args.folder / "answer.md").write_text(verdict, encoding="utf-8")
    print(verdict)
