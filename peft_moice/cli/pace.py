"""How long something takes, said after its first part."""

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)


class TellPace(TrainerCallback):
    """Logs after the first step of a training how long the others take."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._begun: float | None = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        if self._begun is not None and left > 0 and state.is_world_process_zero:
            seconds = time.perf_counter() - self._begun
            message = "The first step took %s; the %s left take about %s."
            logger.info(message, in_words(seconds), f"{left:,}", in_words(seconds * left))
        self._begun = None


def in_words(seconds: float) -> str:
    """A duration in the unit that people would say it in."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 100 else f"{seconds:.0f} seconds"
