"""Backward passes by kernels, which have no derivative of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class FirstOrder(torch.autograd.Function):
    """`gradients(*tensors)`, computed in a backward pass; its own derivative is refused wherever it is asked for.

    PyTorch's `once_differentiable` cuts the gradients off what they were computed from, so that `torch.autograd.grad`
    takes second derivatives along this way for zero.
    """

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[..., Sequence[torch.Tensor | None]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return tuple(gradients(*tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "The kernels of MoICE have no second derivatives. Load the model with attn_implementation='eager', or set "
            "implementation='reference' in MoICEConfig."
        )
