"""`peft-moice extend`: a longer window for a model, as an adapter without parameters."""

import argparse
from typing import get_args

from safetensors.torch import save_file
from transformers import AutoConfig

from ..files.atomic import staged
from ..rope.rules import longest
from ..tuner.extending import By, extension_config, window_of
from .parsing import Outcome, Parser, output_folder

SUMMARY = "let a model read longer texts than its window, without training, unchanged within it"


def parser() -> Parser:
    """Of the command's arguments."""
    parser = Parser(
        "extend",
        (),
        usage="MODEL OUTPUT_DIR [--factor 4] [options] [--json]",
        summary=SUMMARY,
        further=(
            ": an adapter of a few hundred bytes, made from the model's config "
            "alone. Within the window nothing changes, bit for bit. Beyond, keys nearer than --near keep the model's "
            "own angles, and those of keys farther away go on more slowly, so that none leaves what the model knows. "
            "With --by position, all keys have YaRN's angles there, which vLLM serves, too."
        ),
        epilog=(
            "examples:\n  peft-moice extend HuggingFaceTB/SmolLM2-135M-Instruct outputs/longer --factor 4\n"
            "  peft-moice measure --adapter outputs/longer --documents book.txt --lengths 4000 12000"
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of the model; its weights are not loaded.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder to write the adapter to.")
    parser.add_argument("--factor", type=float, help="The new length, in windows. Default: 4; longrope has its own.")
    parser.add_argument(
        "--near", type=int, help="Distance in tokens up to which angles stay. Default: three quarters of the window."
    )
    parser.add_argument(
        "--by",
        choices=get_args(By),
        default="distance",
        help="What changes the ropes of queries beyond the window. Default: %(default)s.",
    )
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Read the config, write the adapter, say what applies where."""
    base = AutoConfig.from_pretrained(args.model)
    config = extension_config(base, args.factor, near=args.near, by=args.by)
    config.base_model_name_or_path, config.inference_mode = args.model, True
    folder = output_folder(args.output_dir)
    # PEFT reads weights of every adapter, so there is a file without any.
    with staged(folder) as staging:
        save_file({}, staging / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    experts, window = config.ropes_by_position(), window_of(base)
    length = longest(experts)
    reach = "on" if length is None else f"{length:,} tokens"
    text = "\n".join(
        [
            f"{folder} extends {args.model} from {window:,} to {reach}:",
            *(f"  {expert.in_words()}" for expert in experts),
            "Load it with `import peft_moice` and AutoPeftModelForCausalLM.from_pretrained.",
        ]
    )
    return Outcome(text, {"output_dir": str(folder), "window": window, "ropes": config.ropes})
