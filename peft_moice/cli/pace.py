"""How much work a training is, and how long it takes: said before it, and after its first step."""

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class TellPace(TrainerCallback):
    """Logs how many `sequences`, `tokens` in them and steps there are, and after the first step how long all take."""

    def __init__(self, sequences: int, tokens: int):
        self.sequences = sequences
        self.tokens = tokens
        self._begun: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            logger.info(
                "%s sequences of %s tokens in the mean; %s steps to go.",
                *(f"{self.sequences:,}", f"{self.tokens / self.sequences:,.0f}"),
                f"{state.max_steps - state.global_step:,}",
            )
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._begun is not None and state.is_world_process_zero:
            seconds, left = time.perf_counter() - self._begun, state.max_steps - state.global_step
            if left > 0:
                logger.info(
                    "The first step took %s; the %s left take about %s.",
                    in_words(seconds),
                    f"{left:,}",
                    in_words(seconds * left),
                )
        self._begun = None


def in_words(seconds: float) -> str:
    """A duration in the unit that people would say it in."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 100 else f"{seconds:.0f} seconds"
