"""Gradients of the balance loss under reentrant checkpointing.

It runs a layer without a graph, and again with one in the backward pass. So the balance loss reads logits that no
gradient leads back from. Their gradients are computed beside the graph; when the backward pass comes by the balance
loss they are left with the layers, whose second run adds them to the gradients of its own logits.
"""

from functools import partial
from typing import Any

import torch

from ..routing.mixture import MixesAngles, RouterRecord


def graph_or_leaf(logits: torch.Tensor) -> torch.Tensor:
    """`logits`, or a leaf in their place where they have lost their graph."""
    return logits if logits.requires_grad else logits.detach().float().requires_grad_()


def send_late_gradients(loss: torch.Tensor, leaves: list[tuple[MixesAngles, str, torch.Tensor]]) -> torch.Tensor:
    """`loss`, such that its backward pass leaves the gradients of `leaves` with their layers.

    Args:
        loss: a scalar that depends on the leaves.
        leaves: layer, router name, and what [`graph_or_leaf`] gave for the router's logits.
    """
    gradients = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], retain_graph=True)
    root = torch.zeros((), device=loss.device, requires_grad=True)
    places = [(layer, name) for layer, name, _ in leaves]
    # torch has no types for `apply`.
    carrier: torch.Tensor = _LeaveGradients.apply(loss, root, places, *gradients)  # type: ignore[no-untyped-call]
    return carrier


class LateGradients:
    """Gradients that wait for a layer to run again; the layer's recorder until it has.

    Attributes:
        waiting: gradients `[B, H, S, N]` by router name, oldest first.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[torch.Tensor]] = {}

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        for record in records:
            gradients = self.waiting.get(record.share.name)
            if gradients and record.logits.requires_grad:
                record.logits.register_hook(partial(_add, gradients.pop(0)))
        if not any(self.waiting.values()):
            layer.recorder = None


def _add(late: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient + late.to(gradient.dtype)


class _LeaveGradients(torch.autograd.Function):
    """The identity on its first input."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        root: torch.Tensor,
        places: list[tuple[MixesAngles, str]],
        *gradients: torch.Tensor,
    ) -> torch.Tensor:
        ctx.places = places
        ctx.save_for_backward(*gradients)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for (layer, name), gradient in zip(ctx.places, ctx.saved_tensors, strict=True):
            if not isinstance(layer.recorder, LateGradients):
                layer.recorder = LateGradients()
            layer.recorder.waiting.setdefault(name, []).append(grad_output.to(gradient.device) * gradient)
        return grad_output, grad_output.new_zeros(()), None, *(None for _ in ctx.places)
