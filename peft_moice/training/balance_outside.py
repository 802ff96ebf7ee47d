"""The balance loss for losses that are computed outside the model: in a training loop, or inside a Trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..hub.push import add_to_card
from .hooks import hooks_of
from .loss_parts import LossPartsMixin
from .pass_records import PassRecords


@dataclass
class CollectedBalanceLoss:
    """The balance loss of the forward passes in a [`collect_balance_loss`] block."""

    passes: list[PassRecords] = field(default_factory=list)

    def loss(
        self, labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor | float:
        """`router_aux_loss_coef` times the balance loss, summed over the passes: a scalar to add to the loss.

        Args:
            labels: `[B, S]`, not shifted, or whatever labels belong to the rows of the batch; -100 where nothing is
                predicted. Default: those that the model was given.
            num_items_in_batch: number of predictions in the whole batch of an optimizer step, by which the loss
                is divided, if this is one of several micro-batches or processes. Default: None, the loss is a mean.

        Returns:
            A float32 scalar; 0.0 if no router that learns from a balance loss ran in training mode.
        """
        return sum(
            passed.balance_loss(passed.arguments.get("labels") if labels is None else labels, num_items_in_batch)
            for passed in self.passes
            if passed.learning_routers()
        )


@contextmanager
def collect_balance_loss(model: nn.Module) -> Iterator[CollectedBalanceLoss]:
    """Keep the balance loss out of `outputs.loss`, for training loops that compute the loss outside the model.

    ```python
    with collect_balance_loss(model) as balance:
        logits = model(input_ids).logits
    loss = my_loss(logits) + balance.loss()
    ```

    Args:
        model: a model with a MoICE adapter, or any wrapper around it.

    Raises:
        ValueError: the model has no MoICE adapter.
    """
    hooks, balance = hooks_of(model), CollectedBalanceLoss()
    hooks.collected = balance.passes
    try:
        yield balance
    finally:
        hooks.collected = None


class BalanceLossMixin(LossPartsMixin):
    """Mixed into a Trainer: adds the balance loss to the loss, and logs it apart as `loss/balance`.

    Needed where the loss is computed outside the model, as TRL's trainers do, and transformers' Trainer with label
    smoothing or `compute_loss_func`. With a plain transformers Trainer the loss is the same with and without it, but
    only with it is logged in parts, see [`LossPartsMixin`]. The model cards that the trainer writes say
    how the model is loaded.

    ```python
    class MoICESFTTrainer(BalanceLossMixin, SFTTrainer):
        pass
    ```
    """

    model: Any
    get_tp_size: Callable[[], int]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        with collect_balance_loss(model) as balance:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        extra = balance.loss(labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As Trainer does with its own loss, because the gradients of the processes are averaged.
            extra = extra * (self.accelerator.num_processes // self.get_tp_size())
        if not isinstance(extra, torch.Tensor):
            return result  # no router learned from this micro-batch
        if num_items_in_batch is None and self.loss_is_a_sum(None):
            # The mean of a micro-batch, where Trainer adds up what TRL's GRPOTrainer has divided itself.
            extra = extra / self.current_gradient_accumulation_steps
        return self.add_part(result, "balance", extra, num_items_in_batch, return_outputs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        create_card(self, super().create_model_card, *args, **kwargs)  # type: ignore[misc]  # of the Trainer


def create_card(trainer: Any, create: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let `create` write the model card of a trainer, and say in it how the model is loaded."""
    create(*args, **kwargs)
    if trainer.is_world_process_zero():
        add_to_card(trainer.model, str(trainer.args.output_dir))
