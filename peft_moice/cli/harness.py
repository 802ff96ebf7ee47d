"""`peft-moice lm_eval`: the command of EleutherAI's lm-evaluation-harness, in a process that knows MoICE adapters."""

import sys
from collections.abc import Sequence

SUMMARY = "run EleutherAI's lm_eval, whose argument peft=ADAPTER then takes adapters of this package"


def run(argv: Sequence[str]) -> None:
    """Run it with arguments of its own. The import of this package is what `--model_args peft=ADAPTER` lacks there.

    Raises:
        ImportError: the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"peft-moice lm_eval needs the harness ({error}): pip install 'lm_eval[hf]'.") from error
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()
