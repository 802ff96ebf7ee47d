"""The balance loss on its way into the training loss, and the router logits on theirs to the caller.

Both are forward hooks of the model that computes the loss. A loss added in the tuner's own forward would be lost
wherever PEFT or transformers call that model directly: with `task_type` unset, or after `model.add_adapter`.

Where the loss is computed outside the model, [`collect_balance_loss`] hands the balance loss over instead, and
[`BalanceLossMixin`] does so inside a Trainer.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import RouterSpec
from .mixture import MixesAngles
from .router import balance_losses


def register_hooks(model: nn.Module) -> None:
    """Register both hooks on `model`, unless they are there already."""
    if collect_router_logits not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(collect_router_logits, with_kwargs=True)
        model.register_forward_hook(add_balance_loss, with_kwargs=True)


def remove_hooks(model: nn.Module) -> None:
    """Undo [`register_hooks`]."""
    # Found by identity, because handles would not survive copies and pickles of the model.
    for hooks, flags, function in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, collect_router_logits),
        (model._forward_hooks, model._forward_hooks_with_kwargs, add_balance_loss),
    ):
        for handle_id in [key for key, hook in hooks.items() if hook is function]:
            del hooks[handle_id]
            flags.pop(handle_id, None)


def hooked_model(model: nn.Module) -> nn.Module:
    """The module below `model` (PEFT's or an engine's wrapper) that the hooks are registered on.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if collect_router_logits in module._forward_pre_hooks.values():
            return module
    raise ValueError(f"{type(model).__name__} has no MoICE adapter. Add one with `peft.get_peft_model` first.")


def mixing_layers(model: nn.Module) -> list[MixesAngles]:
    """The layers of `model` that mix angles, whether by an adapter or by routers of their own."""
    return [module for module in model.modules() if isinstance(module, MixesAngles)]


def collect_router_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: ask the layers for their router logits, if the pass trains or requests them."""
    _check_gradients_are_whole(model)
    observed = getattr(model, OBSERVER, None) is not None
    if model.training or kwargs.get("output_router_logits"):
        for layer in mixing_layers(model):
            layer.router_logits = {}
            layer.router_gates = {} if observed and model.training else None
            if layer.late_gradients is not None:
                # Left by a backward pass that did not reach the layer.
                layer.late_gradients = None


def _check_gradients_are_whole(model: nn.Module) -> None:
    if (getattr(model, "tp_size", None) or 1) == 1 or not (model.training and torch.is_grad_enabled()):
        return
    if any(p.requires_grad for layer in mixing_layers(model) for m in layer.members() for p in m.router.parameters()):
        raise ValueError(
            "Routers cannot be trained under tensor parallelism: every process would see the gradient of its own "
            "heads only. Train with data parallelism, FSDP or DeepSpeed; for inference, call `model.eval()`."
        )


def add_balance_loss(model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook: add `router_aux_loss_coef` times the balance loss of every active adapter to the loss.

    The loss is found at `outputs.loss`, or first in a tuple. `outputs.aux_loss` holds the balance loss itself, and
    with `output_router_logits=True`, `outputs.router_logits` holds a tuple of `[B, H, S, N]` logits, one per layer (a
    dict of such tuples with several active adapters). Where the model has attributes of these names, ours are called
    `outputs.moice_aux_loss` and `outputs.moice_router_logits`.
    """
    if not (model.training or kwargs.get("output_router_logits")):
        return outputs
    arguments = _arguments(model, args, kwargs)
    passed = RouterPass(arguments)
    for layer in mixing_layers(model):
        if layer.router_logits:
            passed.take(layer)
        # From here on, the second forward pass of gradient checkpointing must not leave anything behind.
        layer.router_logits = layer.router_gates = None
    if not passed.logits:
        return outputs
    if kwargs.get("output_router_logits") and not isinstance(outputs, tuple):
        logits = {name: tuple(values) for name, values in passed.logits.items()}
        _set_free_attribute(outputs, "router_logits", next(iter(logits.values())) if len(logits) == 1 else logits)
    if not model.training:
        return outputs

    observe = getattr(model, OBSERVER, None)
    if observe is not None and torch.is_grad_enabled():
        observe(passed)
    if not any(spec.router_aux_loss_coef > 0 for spec in passed.specs.values()):
        return outputs
    collected: CollectedBalanceLoss | None = getattr(model, _COLLECTED, None)
    if collected is not None:
        if torch.is_grad_enabled():
            collected.passes.append(passed)
        return outputs
    extra = passed.weighted_balance_loss(arguments.get("labels"), arguments.get("num_items_in_batch"))
    if passed.balances():
        _warn_if_left_out(extra, outputs)
    if isinstance(outputs, tuple):
        if arguments.get("labels") is None:
            return outputs
        return (outputs[0] + extra.to(outputs[0].device), *outputs[1:])
    _set_free_attribute(outputs, "aux_loss", passed.balance_loss)
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + extra.to(outputs.loss.device)
    return outputs


OBSERVER = "moice_observer"
"""Attribute of the hooked model: called with the [`RouterPass`] of every training pass, see `callback.py`."""

_COLLECTED = "moice_collected_balance_loss"


@dataclass
class CollectedBalanceLoss:
    """The balance loss of the forward passes in a [`collect_balance_loss`] block."""

    passes: list["RouterPass"] = field(default_factory=list)

    def loss(
        self, labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor | float:
        """`router_aux_loss_coef` times the balance loss, summed over the passes: a scalar to add to the loss.

        Args:
            labels: `[B, S]`, not shifted; -100 where no token is predicted. Default: those that the model was given.
            num_items_in_batch: number of predicted tokens in the whole batch of an optimizer step, by which the loss
                is divided, if this is one of several micro-batches or processes. Default: None, the loss is a mean.

        Returns:
            A float32 scalar; 0.0 if no router with a balance loss ran in training mode.
        """
        return sum(
            passed.weighted_balance_loss(
                passed.arguments.get("labels") if labels is None else labels, num_items_in_batch
            )
            for passed in self.passes
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
    hooked, collected = hooked_model(model), CollectedBalanceLoss()
    setattr(hooked, _COLLECTED, collected)
    try:
        yield collected
    finally:
        delattr(hooked, _COLLECTED)


class BalanceLossMixin:
    """Mixed into a Trainer that computes the loss outside the model: adds the balance loss to it.

    TRL's trainers do so, and transformers' Trainer with label smoothing or `compute_loss_func`. (With a plain
    transformers Trainer it changes nothing.)

    ```python
    class MoICESFTTrainer(BalanceLossMixin, SFTTrainer):
        pass
    ```
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        with collect_balance_loss(model) as balance:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        extra = balance.loss(labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As Trainer does with its own loss, because the gradients of the processes are averaged.
            extra = extra * (self.accelerator.num_processes // self.get_tp_size())
        if return_outputs:
            return result[0] + extra, result[1]
        return result + extra


class RouterPass:
    """What the routers decided in one forward pass, and the balance loss that follows from it.

    Attributes:
        arguments: arguments of the model's forward pass by name.
        logits: by router name, one tensor `[B, H, S, N]` per layer.
        gates: likewise, without gradient; empty unless observed.
        layers: likewise, the layers.
        specs: by router name.
        balance_loss: the balance loss without its coefficient, once it has been computed.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.gates: dict[str, list[torch.Tensor]] = {}
        self.layers: dict[str, list[MixesAngles]] = {}
        self.specs: dict[str, RouterSpec] = {}
        self.balance_loss: torch.Tensor | None = None

    def take(self, layer: MixesAngles) -> None:
        """Take over what `layer` has collected."""
        for member in layer.members():
            self.logits.setdefault(member.name, []).append(layer.router_logits[member.name])
            self.layers.setdefault(member.name, []).append(layer)
            self.specs[member.name] = member.spec
            if layer.router_gates:
                self.gates.setdefault(member.name, []).append(layer.router_gates[member.name])

    def balances(self) -> bool:
        """Whether the balance loss has a gradient."""
        return any(
            spec.router_aux_loss_coef > 0 and spec.top_k < self.logits[name][0].shape[-1]
            for name, spec in self.specs.items()
        )

    def token_mask(self) -> torch.Tensor | None:
        """Mask `[B, S]` of tokens that are not padding, or None if all count."""
        mask = self.arguments.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        return mask[:, -self._shape()[1] :]

    def weighted_balance_loss(self, labels: torch.Tensor | None, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The sum over routers of `router_aux_loss_coef` times the balance loss, a float32 scalar.

        Without `num_items`, the loads of all tokens are pooled, as in the official code. With it, the pass is part of
        a larger batch whose other parts are not at hand; then every sequence is balanced on its own, and counts by
        its share of the predicted tokens. The sum over the batch does not depend on how it is cut into passes.
        """
        if num_items is None or labels is None:
            shares = None
            sum_tokens = _pooled
        else:
            sum_tokens = self._sum_by_sequence()
            shares = sum_tokens(self._predicted(labels).float()) / num_items
        names = [name for name, spec in self.specs.items() if spec.router_aux_loss_coef > 0]
        leaves = {name: [_with_graph(logits) for logits in self.logits[name]] for name in names}
        plain, weighted = 0.0, 0.0
        for name in names:
            losses = balance_losses(leaves[name], self.specs[name].top_k, self.token_mask(), sum_tokens)
            if shares is None:
                mean = part = losses[0]
            else:
                part = torch.sum(losses * shares.to(losses.device))
                mean = part / shares.to(losses.device).sum().clamp(min=torch.finfo(torch.float32).tiny)
            plain, weighted = plain + mean, weighted + self.specs[name].router_aux_loss_coef * part
        self.balance_loss = plain.detach()
        if torch.is_grad_enabled():
            weighted = self._with_late_gradients(weighted, leaves)
        return weighted

    def _with_late_gradients(self, weighted: torch.Tensor, leaves: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """Send the gradients of logits that lost their graph by way of the layers.

        Reentrant checkpointing runs a layer without a graph, and again with one in the backward pass. There the layer
        adds the gradient to its logits.
        """
        routes = []
        for name, layer_leaves in leaves.items():
            for layer, logits, leaf in zip(self.layers[name], self.logits[name], layer_leaves, strict=True):
                trained = any(
                    p.requires_grad for m in layer.members() if m.name == name for p in m.router.parameters()
                )
                if not logits.requires_grad and trained:
                    routes.append((layer, name, leaf))
        if not routes:
            return weighted
        gradients = torch.autograd.grad(weighted, [leaf for *_, leaf in routes], retain_graph=True)
        root = torch.zeros((), device=weighted.device, requires_grad=True)
        return _SendLate.apply(weighted, root, [(layer, name) for layer, name, _ in routes], *gradients)

    def _shape(self) -> tuple[int, int]:
        """Batch size B and length S of the pass."""
        logits = next(iter(self.logits.values()))[0]
        return logits.shape[0], logits.shape[-2]

    def _predicted(self, labels: torch.Tensor) -> torch.Tensor:
        """Mask `[B, S]` of tokens whose prediction is part of the loss."""
        shifted = self.arguments.get("shift_labels")
        if shifted is not None:
            return shifted.ne(-100)
        return nn.functional.pad(labels[..., 1:].ne(-100), (1, 0))

    def _sum_by_sequence(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that sums values `[B, S, ...]` over the tokens of each sequence.

        A sequence is a row, or the part of a packed row in which `position_ids` count up.
        """
        positions = self.arguments.get("position_ids")
        if not isinstance(positions, torch.Tensor) or positions.shape != self._shape():
            return _by_row
        starts = nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
        ids = starts.flatten().cumsum(dim=0) - 1

        def sum_tokens(values: torch.Tensor) -> torch.Tensor:
            # As many sums as there are tokens, because counting the sequences would wait for the device.
            sums = values.new_zeros(ids.shape[0], *values.shape[2:])
            return sums.index_add(0, ids.to(values.device), values.flatten(0, 1))

        return sum_tokens


class _SendLate(torch.autograd.Function):
    """The identity on its first input, which on the way back hands further gradients to layers."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, root: torch.Tensor, routes: list[tuple], *gradients: torch.Tensor):
        ctx.routes = routes
        ctx.save_for_backward(*gradients)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        for (layer, name), gradient in zip(ctx.routes, ctx.saved_tensors, strict=True):
            if layer.late_gradients is None:
                layer.late_gradients = {}
            scale = grad_output.to(gradient.device)
            layer.late_gradients.setdefault(name, []).append(scale * gradient)
        return grad_output, grad_output.new_zeros(()), None, *(None for _ in ctx.routes)


def _with_graph(logits: torch.Tensor) -> torch.Tensor:
    """`logits`, or a leaf in its place where it has lost its graph."""
    if logits.requires_grad or not torch.is_grad_enabled():
        return logits
    return logits.detach().float().requires_grad_()


def _pooled(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=(0, 1))[None]


def _by_row(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=1)


def _warn_if_left_out(extra: torch.Tensor, outputs: Any) -> None:
    """Warn in the backward pass if `extra` takes no part in it while other outputs of the model do."""
    if not extra.requires_grad or torch.compiler.is_compiling():
        return
    # The hooks must not refer to tensors: a cycle through the graph would never be freed.
    took_part = False

    def mark(gradient: torch.Tensor) -> None:
        nonlocal took_part
        took_part = True

    def check(gradient: torch.Tensor) -> None:
        if not took_part:
            warnings.warn(
                "The loss was computed outside the model, so the balance loss of MoICE has no part in it. In a "
                "Trainer, mix in `peft_moice.BalanceLossMixin`; in a training loop, use "
                "`peft_moice.collect_balance_loss`; or set `router_aux_loss_coef=0` in MoICEConfig.",
                stacklevel=2,
            )

    # The balance loss was computed last, so a backward pass that it is part of comes by it first.
    extra.register_hook(mark)
    values = outputs[1:] if isinstance(outputs, tuple) else [v for k, v in outputs.items() if k != "loss"]
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(check)


def _set_free_attribute(outputs: Any, name: str, value: Any) -> None:
    setattr(outputs, name if getattr(outputs, name, None) is None else f"moice_{name}", value)


def _arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the forward pass by name."""
    names = inspect.signature(type(model).forward).parameters
    return {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}
