"""`peft-moice merge`: an adapter and its base model as one transformers model."""

import argparse
from pathlib import Path
from typing import get_args

from ..routing.spec import PEFT_TYPE_NAME
from ..tuner.check import check
from .models import Dtype, base_name, load_model, load_tokenizer
from .parsing import Outcome, Parser, UsageError

SUMMARY = "build an adapter into its base model, as a folder that from_pretrained reads"


def parser() -> Parser:
    """Of the command's arguments."""
    parser = Parser(
        "merge",
        (),
        usage="ADAPTER OUTPUT_DIR [options] [--json]",
        summary=SUMMARY,
        further=(
            ". Routers are no weight update, so they stay routers: whoever loads the model needs `import peft_moice`."
        ),
        epilog="example:\n  peft-moice merge outputs/routers outputs/merged",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder or Hub id of the adapter.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder to write; has to be new or empty.")
    parser.add_argument("--model", help="Folder or Hub id of the base model. Default: the adapter's config knows it.")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), help="Of the merged weights: float32, bfloat16, float16.", default="auto"
    )
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Load, merge, check, write."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"{output_dir} is there already. Name a new folder, or empty it first.")
    base = base_name(args.model, args.adapter, PEFT_TYPE_NAME)
    tokenizer = load_tokenizer(base, args.adapter)
    merged = load_model(base, args.dtype, args.adapter).merge_and_unload()
    check(merged)
    merged.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    size = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
    text = (
        f"{type(merged).__name__} with its tokenizer is in {output_dir} ({size:,} bytes of weights). Load it with "
        "`import peft_moice` and AutoModelForCausalLM.from_pretrained."
    )
    return Outcome(
        text, {"output_dir": str(output_dir), "class": type(merged).__name__, "base_model": base, "bytes": size}
    )
