"""The reference of the command line, made of what the parsers know: a page in Markdown."""

import argparse
from collections.abc import Iterator
from types import ModuleType

from peft_moice.cli.main import COMMANDS

INTRODUCTION = """# Commands

`peft-moice COMMAND`, or `python -m peft_moice COMMAND`. All but `run` take `--json` (the result as one JSON object)
and `--traceback` (where an error comes from). Exit codes: 0 done, 2 an error that says what to change, 130 if stopped.
Results go to the standard output, all else to the standard error.
"""


def commands_page() -> str:
    """One section for each command: usage, a table of its arguments, and the rest of its help."""
    return "\n".join([INTRODUCTION, *(line for command in COMMANDS.items() for line in section(*command))])


def section(name: str, module: ModuleType) -> Iterator[str]:
    """The lines about a command."""
    parser = getattr(module, "short_parser", module.parser)()
    yield from (f"## {name}\n", " ".join(parser.description.split()) + "\n", f"```text\n{parser.usage}\n```\n")
    yield from ("| argument | default | what it is |", "|---|---|---|")
    for action in parser._actions:
        if action.dest != "help":
            yield f"| `{written(action)}` | {default(action)} | {meaning(action)} |"
    yield f"\n```text\n{parser.epilog}\n```\n"


def written(action: argparse.Action) -> str:
    """An argument with what stands behind it."""
    if not action.option_strings:
        return str(action.metavar)
    name = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0 or isinstance(action.const, bool):
        return name
    return f"{name} { {int: 'N', float: 'X'}.get(action.type, 'NAME') }{' ...' if action.nargs == '+' else ''}"


def default(action: argparse.Action) -> str:
    """What holds without it, where that is a value."""
    if isinstance(action.default, bool) or action.default in (None, [], ""):
        return ""
    values = action.default if isinstance(action.default, list) else [action.default]
    return f"`{' '.join(map(str, values))}`"


def meaning(action: argparse.Action) -> str:
    """What its help says, with the choices that there are."""
    text = (action.help or "").replace("|", "\\|")
    choices = [str(choice) for choice in action.choices or ()]
    if all(choice in text for choice in choices):
        return text
    return f"{text} One of {', '.join(f'`{choice}`' for choice in choices)}."
