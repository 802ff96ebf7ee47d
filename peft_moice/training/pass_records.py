"""`PassRecords`: what the routers decided in one forward pass of a model, and the balance loss that follows."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..routing.mixture import MixesAngles, RouterRecord
from ..routing.router import balance_losses
from ..routing.spec import RouterSpec


class PassRecords:
    """Collects the records of one forward pass; the recorder of the model's layers while it lasts.

    Made of the model that was called with `args` and `kwargs`, and of what [`shifts_labels`] says of it.

    Attributes:
        arguments: arguments of the pass by name.
        records: by router name, one record per layer, with the layer.
        aux_loss: the balance loss without its coefficient, summed over the routers whose coefficient is not zero, once
            [`balance_loss`] has been called; None if there are none.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shifts_labels: bool):
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self.records: dict[str, list[tuple[MixesAngles, RouterRecord]]] = {}
        self.aux_loss: torch.Tensor | None = None
        self._shifts_labels = shifts_labels
        encoder: nn.Module | None = model.get_encoder() if _has_encoder(model) else None  # type: ignore[operator]
        # A decoder or an encoder that is called alone passes for its own encoder.
        self._has_encoder = encoder is not None and encoder is not model
        self._encoder_layers = set(mixing_layers(encoder)) if encoder is not None else set()

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        for record in records:
            self.records.setdefault(record.share.name, []).append((layer, record))

    def router_logits(self) -> tuple[torch.Tensor, ...] | dict[str, tuple[torch.Tensor, ...]]:
        """Logits `[B, H, S, N]` of each layer; by router name if there are several."""
        logits = {name: tuple(record.logits for _, record in found) for name, found in self.records.items()}
        return next(iter(logits.values())) if len(logits) == 1 else logits

    def token_mask(self, layer: MixesAngles, record: RouterRecord) -> torch.Tensor | None:
        """Mask `[B, S]` of the tokens of a record of `layer` that are not padding, or None if all count."""
        batch, _, length, _ = record.logits.shape
        mask = self.arguments.get("attention_mask")
        if self._has_encoder and layer not in self._encoder_layers:
            mask, labels = self.arguments.get("decoder_attention_mask"), self.arguments.get("labels")
            if mask is None and labels is not None and self.arguments.get("decoder_input_ids") is None:
                # The model makes the decoder's tokens from the labels, one place later, and padding from -100.
                mask = nn.functional.pad(labels[:, :-1].ne(-100), (1, 0), value=True)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return mask[:, -length:]

    def learning_routers(self) -> list[str]:
        """Names of the routers that learn from a balance loss."""
        return [
            name
            for name in self._balanced_routers()
            if self._spec(name).top_k < self.records[name][0][1].logits.shape[-1]
            and any(record.share.router.is_trainable for _, record in self.records[name])
        ]

    def balance_loss(self, labels: torch.Tensor | None, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The sum over learning routers of `router_aux_loss_coef` times the balance loss, a float32 scalar.

        Without `num_items`, the loads of all tokens are pooled, as in the official code. With it, the pass is part of
        a larger batch whose other parts are not at hand; then every sequence is balanced on its own, and counts by
        its share of what is predicted. The sum over the batch does not depend on how it is cut into passes.

        Args:
            labels: as the model takes them, -100 where nothing is predicted.
            num_items: number of predictions in the whole batch.

        Raises:
            ValueError: the graph of a router's logits was lost, and its gradient with it.
        """
        sum_tokens: Callable[[torch.Tensor], torch.Tensor] = _pooled
        shares: torch.Tensor | None = None
        if num_items is not None and labels is not None:
            sum_tokens, items = self._items(labels)
            # Where nothing is predicted in the whole batch, no sequence has a share.
            shares = items / torch.as_tensor(num_items, device=items.device).clamp(min=1)
        loss = torch.zeros((), device="cpu")
        aux_loss: torch.Tensor | None = None
        learning = self.learning_routers()
        for name in self._balanced_routers():
            found, spec = self.records[name], self._spec(name)
            logits = [record.logits if name in learning else record.logits.detach() for _, record in found]
            if name in learning and torch.is_grad_enabled():
                _check_graph(found)
            masks = [self.token_mask(layer, record) for layer, record in found]
            losses = balance_losses(logits, spec.top_k, masks, sum_tokens)
            if shares is None:
                mean = part = losses[0]
            else:
                part = torch.sum(losses * shares.to(losses.device))
                mean = part / shares.to(losses.device).sum().clamp(min=torch.finfo(torch.float32).tiny)
            aux_loss = mean.detach() if aux_loss is None else aux_loss + mean.detach().to(aux_loss.device)
            if name in learning:
                loss = loss.to(part.device) + spec.router_aux_loss_coef * part
        self.aux_loss = aux_loss
        return loss

    def _balanced_routers(self) -> list[str]:
        return [name for name in self.records if self._spec(name).router_aux_loss_coef > 0]

    def _spec(self, name: str) -> RouterSpec:
        return self.records[name][0][1].share.spec

    def _items(self, labels: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """A function that sums values `[B, S, ...]` over the tokens of each of M groups, and how many predictions
        `[M]` each group has.

        A group is a sequence: a row, or the part of a packed row in which `position_ids` count up. Where labels do not
        belong to rows, it is the pass.
        """
        last_logits = next(reversed(self.records.values()))[-1][1].logits
        batch, length = last_logits.shape[0], last_logits.shape[2]
        shifted = self.arguments.get("shift_labels")
        if shifted is not None:
            predicted = shifted.ne(-100)
        elif self._shifts_labels and labels.shape == (batch, length):
            predicted = nn.functional.pad(labels[:, 1:].ne(-100), (1, 0))
        else:
            predicted = labels.ne(-100)
        if predicted.shape == (batch, length):
            sum_tokens = self._sum_by_sequence(batch, length)
            return sum_tokens, sum_tokens(predicted.float())
        if predicted.dim() > 0 and predicted.shape[0] == batch:
            return _by_row, predicted.reshape(batch, -1).sum(dim=1)
        return _pooled, predicted.sum()[None]

    def _sum_by_sequence(self, batch: int, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
        positions = self.arguments.get("position_ids")
        if self._has_encoder or not isinstance(positions, torch.Tensor) or positions.shape != (batch, length):
            return _by_row
        starts = nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
        ids = starts.flatten().cumsum(dim=0) - 1

        def sum_tokens(values: torch.Tensor) -> torch.Tensor:
            # As many sums as there are tokens, because counting the sequences would wait for the device.
            sums = values.new_zeros(ids.shape[0], *values.shape[2:])
            return sums.index_add(0, ids.to(values.device), values.flatten(0, 1))

        return sum_tokens


def shifts_labels(model: nn.Module) -> bool:
    """Whether `model` takes labels as its input, and predicts each from the tokens before it.

    As Trainer counts predicted tokens. Decoders behind an encoder shift their inputs instead.
    """
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and not _has_encoder(model)


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def mixing_layers(model: nn.Module) -> list[MixesAngles]:
    """The layers of `model` that mix angles, whether by an adapter or by routers of their own."""
    return [module for module in model.modules() if isinstance(module, MixesAngles)]


def _check_graph(found: list[tuple[MixesAngles, RouterRecord]]) -> None:
    for layer, record in found:
        if record.share.router.is_trainable and not record.logits.requires_grad:
            raise ValueError(
                f"The router {record.share.name!r} learns from a balance loss, but layer {layer.layer_idx} ran "
                "without gradients, as under reentrant gradient checkpointing, so that this part of its gradient "
                'would be lost. Train with `gradient_checkpointing_kwargs={"use_reentrant": False}` (or '
                '`model.gradient_checkpointing_enable({"use_reentrant": False})`), or without the balance loss: '
                "`router_aux_loss_coef=0` in MoICEConfig."
            )


def _pooled(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=(0, 1))[None]


def _by_row(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=1)
