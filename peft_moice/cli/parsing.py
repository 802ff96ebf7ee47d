"""Arguments from dataclasses, and help on one screen."""

import argparse
import difflib
import importlib.util
import logging
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from transformers import HfArgumentParser

logger = logging.getLogger(__name__)

_WIDTH = 118
_LONGEST_CHOICES = 22


class UsageError(Exception):
    """Arguments that do not go, and what to do about it."""


def option(help: str, default: Any = MISSING) -> Any:
    """A field of a dataclass of arguments; one without a default has to be given."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help}, **given)


@dataclass(frozen=True)
class Outcome:
    """What a command found or made.

    Attributes:
        text: for people.
        values: the same in JSON's types; None in processes that have nothing to say.
        interrupted: whether it was stopped before its end.
    """

    text: str
    values: dict[str, Any] | None
    interrupted: bool = False


def can_draw() -> bool:
    """Whether matplotlib is there; a warning where it is not."""
    is_there = importlib.util.find_spec("matplotlib") is not None
    if not is_there:
        logger.warning("Without matplotlib no pictures are drawn: pip install 'peft_moice[plot]'.")
    return is_there


def output_folder(name: str) -> Path:
    """The folder `name`, made if it is missing; that nothing can be written there shows now, not after the work."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {name}: nothing can be written there ({error}). Name another.") from None
    return folder


class Parser(HfArgumentParser):
    """Parses dataclasses of arguments; errors are raised as [`UsageError`].

    The help of `command` begins with its `usage`, says its `summary` and what is `further` said of it, and ends with
    `epilog`.
    """

    def __init__(
        self,
        command: str,
        dataclass_types: Iterable[Any],
        *,
        usage: str,
        summary: str,
        further: str = ".",
        epilog: str,
    ):
        super().__init__(
            dataclass_types,
            prog=f"peft-moice {command}",
            usage=f"peft-moice {command} {usage}",
            description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}{further}", _WIDTH),
            epilog=epilog,
            formatter_class=_OneScreen,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help explains.)")

    def parse(self, argv: Sequence[str]) -> Any:
        """The dataclass, or a namespace where there is none; a list of several.

        Raises:
            UsageError: an argument is unknown, missing or out of its choices.
        """
        *parsed, unknown = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]}." + (f" Did you mean {near[0]}?" if near else ""))
        return parsed if len(parsed) > 1 else parsed[0]


class _OneScreen(argparse.RawDescriptionHelpFormatter):
    """One line for each argument: its name as it is written here, what it is, its choices and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        # The same name with hyphens is understood as well.
        name = next(option for option in action.option_strings if option.startswith("--"))
        if action.nargs == 0 or isinstance(action.const, bool):
            return name
        return f"{name} {self._value(action)}{' ...' if action.nargs == '+' else ''}"

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        is_said = not isinstance(action.default, bool) and action.default not in (None, argparse.SUPPRESS, [], "")
        if action.option_strings and is_said:
            default = action.default if isinstance(action.default, list) else [action.default]
            text += f" [{' '.join(map(str, default))}]"
        return text

    @staticmethod
    def _value(action: argparse.Action) -> str:
        """What stands for the value: the choices where they are few, else its kind."""
        choices = "|".join(map(str, action.choices or ()))
        if 0 < len(choices) <= _LONGEST_CHOICES:
            return choices
        return {int: "N", float: "X"}.get(action.type, "NAME")  # type: ignore[call-overload,no-any-return]
