"""Loads what the scripts measure: a plain model, one with an adapter of PEFT, or what `compare.py --save` wrote."""

import argparse
from pathlib import Path

import torch
from methods import METHODS
from methods.static import freeze_to_best
from models import number_of_parameters
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is measured."""
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--adapter", help="folder of an adapter of PEFT")
    parser.add_argument("--method", default="base", choices=METHODS)
    parser.add_argument("--load", type=Path, help="file that `compare.py --method METHOD --save` wrote")
    parser.add_argument("--freeze_to_best", action="store_true", help="static gates: keep each head's greatest only")
    parser.add_argument("--float32", action="store_true", help="frozen linear layers too, which else are bfloat16")


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    """The model in float32, in evaluation mode, and its tokenizer. See [`models.halve`] for `--float32`.

    Raises:
        ValueError: a trained method without its file, a file without its method, or a method beside an adapter.
    """
    refusal = ValueError("Give --method with --load, or --adapter alone, or none of them for the base model.")
    if args.adapter and (args.load or args.method != "base"):
        raise refusal
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False)
    if args.adapter:
        return PeftModel.from_pretrained(model, args.adapter).eval(), tokenizer
    make, options = METHODS[args.method]
    model = make(model, {**options, "tokenizer": tokenizer})
    if bool(number_of_parameters(model)) != bool(args.load):
        raise refusal
    if args.load:
        saved = torch.load(args.load)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(saved[name])
    if args.freeze_to_best:
        freeze_to_best(model)
    return model.eval(), tokenizer


def named(args: argparse.Namespace) -> str:
    """What was measured, without the machine's folders."""
    base = Path(args.model).name
    if args.adapter:
        return f"{base} with {Path(args.adapter).name}"
    return base if args.method == "base" else f"{base}, {args.method}{', frozen' * args.freeze_to_best}"
