"""What is added to the training loss, logged apart from it."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments


class LossPartsMixin:
    """Mixed into a Trainer: splits the logged `loss` into `loss/task` and what mixins add to it.

    Each part is logged as it was added, with its weight, and `loss` is the sum of all. Means over the same steps and
    processes as `loss`. Nothing is logged where nothing was added.
    """

    args: TrainingArguments
    accelerator: Accelerator
    state: TrainerState
    current_gradient_accumulation_steps: int

    def add_part(
        self,
        result: Any,
        name: str,
        added: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        return_outputs: bool,
    ) -> Any:
        """What `compute_loss` returns, `result`, with `added` in its loss, counted as the part `loss/<name>`."""
        self.note_part(name, added, num_items_in_batch)
        return (result[0] + added, result[1]) if return_outputs else result + added

    def note_part(self, name: str, added: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> None:
        """Count `added`, a scalar that `compute_loss` adds to the loss of a micro-batch, as the part `loss/<name>`."""
        if getattr(self, "_noted_in", None) is not self.state:
            # Every training has a state of its own. One that ended between two logs leaves parts behind.
            self._noted_in = self.state
            self._parts: dict[str, torch.Tensor] = {}
            self._part_steps: set[int] = set()
        if not self.loss_is_a_sum(num_items_in_batch):
            added = added / self.current_gradient_accumulation_steps
        added = added.detach().float()
        self._parts[name] = self._parts[name] + added if name in self._parts else added
        self._part_steps.add(self.state.global_step)

    def loss_is_a_sum(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether Trainer adds the losses of micro-batches up as they are; else it takes their mean."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return scaled
        return num_items_in_batch is not None or getattr(self, "compute_loss_func", None) is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and getattr(self, "_noted_in", None) is self.state and self._parts:
            steps = len(self._part_steps)
            # All processes have the same parts.
            means = {
                name: self.accelerator.reduce(total, "mean").item() / steps for name, total in self._parts.items()
            }
            logs["loss/task"] = logs["loss"] - sum(means.values())
            logs |= {f"loss/{name}": value for name, value in means.items()}
            self._parts, self._part_steps = {}, set()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
