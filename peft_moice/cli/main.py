"""Finds the command, runs it, and says what came out."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pickle import UnpicklingError
from types import ModuleType

import torch
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .. import __version__
from . import angles, extend, info, measure, merge, run, train
from .parsing import UsageError

COMMANDS: dict[str, ModuleType] = {
    "extend": extend,
    "measure": measure,
    "train": train,
    "angles": angles,
    "merge": merge,
    "info": info,
    "run": run,
}
"""Modules with a `SUMMARY`, a `parser()` and `run(arguments)`."""

_OVERVIEW = f"""peft-moice {__version__}: longer windows for language models, and routers against what they lose within

{{commands}}

  peft-moice extend HuggingFaceTB/SmolLM2-135M-Instruct outputs/longer    read four times as much
  peft-moice measure --model HuggingFaceTB/SmolLM2-135M-Instruct          is there something to repair?
  peft-moice train --preset chats --model ... --train_files chats.jsonl   train routers, nothing else
  peft-moice measure --adapter outputs/routers                            did it help?

peft-moice COMMAND --help explains a command. All but `run` take --json, to print the result as one JSON object, and
--traceback, to show where an error comes from. Exit codes: 0 done, 2 an error that says what to change, 130
interrupted.
"""

_OF_CALLERS = ("transformers.generation.configuration_utils", "transformers.utils.generic")
"""Loggers of flags that a checkpoint's generation config has in vain, and of names that are about to change."""

_TO_MEND = (UsageError, ValueError, TypeError, OSError, ImportError, SafetensorError, UnpicklingError)
"""Errors whose message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own) names; the result is an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:<{width}}  {module.SUMMARY}" for name, module in COMMANDS.items())
        print(_OVERVIEW.format(commands="\n".join(lines)), end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail("peft-moice", f"there is no command {name!r}. Choose one of {', '.join(COMMANDS)}.")
    if name == "run":
        try:
            parsed = run.parser().parse(rest)
        except UsageError as error:
            return _fail("peft-moice run", str(error))
        # Output, flags and errors are from here on those of another program.
        run.run(parsed)
        return 0
    as_json = _take(rest, "--json")
    with_traceback = _take(rest, "--traceback")
    prog = f"peft-moice {name}"
    try:
        parsed = COMMANDS[name].parser().parse(rest)
        # What libraries print on the way is no part of the result.
        with _talking(), redirect_stdout(sys.stderr):
            outcome = COMMANDS[name].run(parsed)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted before there was anything to keep.", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        if with_traceback:
            raise
        return _fail(prog, f"out of memory ({error}). Take shorter lengths, smaller batches, or a smaller dtype.")
    except _TO_MEND as error:
        if with_traceback:
            raise
        return _fail(prog, str(error) or type(error).__name__)
    if as_json and outcome.values is not None:
        print(json.dumps({**outcome.values, "interrupted": outcome.interrupted}, indent=2))
    elif outcome.text:
        print(outcome.text)
    return 130 if outcome.interrupted else 0


@contextmanager
def _talking() -> Iterator[None]:
    """What the package logs goes to stderr, from level INFO on; what libraries tell those who call them goes nowhere,
    nor do bars of what takes seconds.
    """
    levels = {"peft_moice": logging.INFO, **dict.fromkeys(_OF_CALLERS, logging.ERROR)}
    before = {name: logging.getLogger(name).level for name in levels}
    handler, had_bars = logging.StreamHandler(), is_progress_bar_enabled()
    logging.getLogger("peft_moice").addHandler(handler)
    disable_progress_bar()
    enable_progress_bars()  # those of downloads, which the line before takes as well
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger("peft_moice").removeHandler(handler)
        if had_bars:
            enable_progress_bar()


def _take(arguments: list[str], flag: str) -> bool:
    """Whether `flag` is among `arguments`, from which it is removed."""
    present = flag in arguments
    arguments[:] = [argument for argument in arguments if argument != flag]
    return present


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2
