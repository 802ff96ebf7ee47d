"""`peft-moice run`: someone else's program, which loads PEFT adapters and does not know ours."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .parsing import Parser, UsageError

SUMMARY = "run a Python module that loads adapters by PEFT alone, such as lm_eval"

_EPILOG = """Everything behind MODULE is its own. What it returns as its exit code is that of this command.

examples:
  peft-moice run lm_eval --model hf --model_args pretrained=MODEL,peft=outputs/routers --tasks hellaswag
  accelerate launch -m peft_moice run lm_eval --model hf --model_args pretrained=MODEL,peft=outputs/routers ..."""


def parser() -> Parser:
    """Of the command's arguments."""
    parser = _BeforeOthers(
        "run",
        (),
        usage="MODULE [its arguments]",
        summary=SUMMARY,
        further=": as `python -m MODULE` does, with our PEFT type registered (else: KeyError: 'MOICE').",
        epilog=_EPILOG,
    )
    parser.add_argument("module", metavar="MODULE", help="Name of an installed module or package.")
    return parser


class _BeforeOthers(Parser):
    """Parses the first argument alone."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        parsed: argparse.Namespace = super().parse(argv[:1])
        parsed.arguments = list(argv[1:])
        if find_spec(parsed.module.partition(".")[0]) is None:
            raise UsageError(f"there is no module {parsed.module!r} in this environment; install what has it.")
        return parsed


def run(args: argparse.Namespace) -> None:
    """Run the module as the main program of this process."""
    sys.argv = [args.module, *args.arguments]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)
