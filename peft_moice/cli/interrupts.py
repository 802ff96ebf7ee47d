"""Ctrl-C, and SIGTERM of a scheduler, end training after the step under way, with nothing lost."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Stops a trainer after the step in which a signal arrives, with a checkpoint to resume from.

    A second signal raises KeyboardInterrupt at once. With several processes, all stop after the same step. `stopped`
    says whether a signal has arrived.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside."""
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(self.stopped), device=accelerator.device)
            self.stopped = bool(accelerator.reduce(flag).item())
        if self.stopped:
            control.should_training_stop = control.should_save = True
        return control

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        logger.warning("Stopping after this step, then saving. Once more stops now.")
