"""What is added to the training loss, logged apart from it; and no step that would destroy the weights."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments


class LossPartsMixin:
    """Mixed into a Trainer: splits the logged `loss` into `loss/task` and what mixins add to it.

    Each part is logged as it was added, with its weight, and `loss` is the sum of all. Means over the same steps and
    processes as `loss`. Nothing is logged where nothing was added.

    Raises:
        RuntimeError: in training, before a step whose gradient is not finite.
    """

    args: TrainingArguments
    accelerator: Accelerator
    state: TrainerState
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_FiniteSteps(self.accelerator))  # type: ignore[attr-defined]  # of the Trainer

    def add_part(
        self,
        result: Any,
        name: str,
        added: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        return_outputs: bool,
    ) -> Any:
        """What `compute_loss` returns, `result`, with `added` in its loss, counted as the part `loss/<name>`."""
        result = (result[0] + added, result[1]) if return_outputs else result + added
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
        return result

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


class DivergedError(RuntimeError):
    """A step whose gradient is not finite; it was not taken."""


class _FiniteSteps(TrainerCallback):
    """Ends the training before a step that would make the weights useless."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.accelerator.scaler is not None:
            return  # it leaves such steps out itself, until its scale fits
        model: nn.Module = kwargs["model"]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Of a gradient that is spread over processes, the part that is here.
        finite = [getattr(gradient, "_local_tensor", gradient).isfinite().all() for gradient in gradients]
        if finite and not torch.stack([part.to(finite[0].device) for part in finite]).all():
            raise DivergedError(
                f"The gradient of step {state.global_step + 1} is not finite, so the step was not taken, and the "
                "weights are as they were before it. Look at the rows of this step, lower the learning rate, or train "
                "in bfloat16 or float32; go on from the last checkpoint."
            )
