"""`MoICECallback`: what the routers do during training, in the logs of transformers' Trainer."""

import logging
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..routing.describing import router_in_a_line
from ..routing.mixture import RouterRecord
from .balance_outside import BalanceLossMixin, create_card
from .hooks import hooks_of
from .pass_records import PassRecords, mixing_layers

logger = logging.getLogger(__name__)

_START = "moice/start"
"""Where Trainer's state, and so a checkpoint, keeps the mean gates of the first step."""


Sums = dict[str, torch.Tensor]


class MoICECallback(TrainerCallback):
    """Logs what the routers do, whenever Trainer logs the training loss.

    ```python
    trainer = Trainer(model, args, ...)
    trainer.add_callback(MoICECallback(trainer))
    ```

    Trainer's own log (and so its `log_history`) receives, over all layers and processes:

    - `moice/balance_loss`, where K < N: about K (`top_k`) with even loads, N if the same experts always win;
    - `moice/entropy`: mean entropy of the routers' probabilities in nats, 0 to log N;
    - `moice/max_load`, where K < N: load of the most used expert, K/N to 1;
    - `moice/drift`: how far the mean gates have moved since the first step (half the sum of absolute differences, mean
      over layers), 0 to 1, or more where identity scales are beyond 1.

    What `report_to` names (TensorBoard, ...) receives the same per layer, as `moice/layer_<index>/...`, with
    `gate_<expert>` (its mean gate) and, where K < N, `load_<expert>` (share of tokens and heads that picked it).
    Padding counts nowhere. Only steps that are logged are measured, over all their micro-batches; where Trainer logs
    by epoch, it is the last step of each.

    At the start, one line tells Python's log (`logging`, level INFO) what trains, the base angles and K. With
    [`BalanceLossMixin`], Trainer's log also has the balance loss apart from the rest of the loss.

    The model cards that this trainer writes also say what the routers are and how the model is loaded.

    Args:
        trainer: the trainer that the callback is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.statistics = RouterStatistics()
        self.start: dict[str, list[list[float]]] | None = None
        if not isinstance(trainer, BalanceLossMixin):
            create = partial(create_card, trainer, trainer.create_model_card)
            trainer.create_model_card = create  # type: ignore[method-assign]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(self.trainer.model).observer = self.statistics
        if self.trainer.is_world_process_zero():
            logger.info("%s", describe_training(self.trainer.model))
        self.start = state.stateful_callbacks.get(_START)
        if self.start is None and state.global_step > 0:
            logger.warning("The checkpoint knows no gates, so moice/drift counts from step %d.", state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.statistics.clear()
        self.statistics.enabled = self.start is None or _is_logged(args, state, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.statistics.sums.keys() - (self.start or {}).keys():
            # The first step, or adapters that were not active in it.
            seen = {name: _means(sums)["gates"].tolist() for name, sums in self._reduced().items()}
            self.start = {**seen, **(self.start or {})}
            state.stateful_callbacks[_START] = self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}) or not self.statistics.sums or self.start is None:
            return
        reduced = self._reduced()
        self.statistics.clear()
        summary: dict[str, float] = {}
        details: dict[str, float] = {}
        for router, sums in reduced.items():
            prefix = "moice" if len(reduced) == 1 else f"moice/{router}"
            layers, pooled = _means(sums), _means({part: values.sum(dim=0) for part, values in sums.items()})
            experts = range(layers["gates"].shape[-1])
            drift = (layers["gates"] - torch.tensor(self.start[router], device="cpu")).abs().sum(dim=-1) / 2
            by_layer = {"entropy": layers["entropy"], "drift": drift}
            by_layer |= {f"gate_{expert}": layers["gates"][:, expert] for expert in experts}
            summary |= {f"{prefix}/entropy": pooled["entropy"].item(), f"{prefix}/drift": drift.mean().item()}
            if pooled["loads"].min() < 1:  # where every expert is picked, these are constants
                summary[f"{prefix}/balance_loss"] = pooled["balance_loss"].item()
                summary[f"{prefix}/max_load"] = pooled["loads"].max().item()
                by_layer["balance_loss"] = layers["balance_loss"]
                by_layer |= {f"load_{expert}": layers["loads"][:, expert] for expert in experts}
            for row, index in enumerate(self.statistics.layers[router]):
                details |= {f"{prefix}/layer_{index:02d}/{name}": by_layer[name][row].item() for name in by_layer}
        # The method of the base class: trainers that extend it flush metrics of their own.
        Trainer.log(self.trainer, summary)
        reporters: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(args, state, control, logs=details, model=self.trainer.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(self.trainer.model).observer = None
        self.statistics.clear()

    def _reduced(self) -> dict[str, Sums]:
        """The sums over all processes, on the CPU."""
        return {
            name: {part: values.cpu() for part, values in self.trainer.accelerator.reduce(sums).items()}
            for name, sums in self.statistics.sums.items()
        }


def describe_training(model: nn.Module) -> str:
    """One line about what trains in a model: parameters, layers, base angles and K of its active adapters."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trainable, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    layers = [layer for layer in mixing_layers(model) if layer.shares()]
    specs = {share.name: share.spec for layer in layers for share in layer.shares()}
    routers = "; ".join(map(router_in_a_line, specs.values()))
    share = f"{trainable:,} of {total:,} parameters ({trainable / max(total, 1):.3%})"
    return f"training {share}; routers in {len(layers)} layers: {routers}"


def _is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether Trainer may log after optimizer step `step`, counted from 1."""
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == "epoch":
        return True  # an epoch may end at any step: with its data, the last step of all, or early stopping
    return args.logging_strategy == "steps" and step % state.logging_steps == 0


class RouterStatistics:
    """Sums over the forward passes since it was cleared, by router name. Called with each of them.

    Attributes:
        enabled: whether passes are counted. Default: False.
        sums: as [`_sums_of_layer`] gives them, with L layers in front.
        layers: the layers' indices in the model.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.sums: dict[str, Sums] = {}
        self.layers: dict[str, list[int]] = {}

    def clear(self) -> None:
        self.sums = {}

    @torch.no_grad()
    def __call__(self, passed: PassRecords) -> None:
        if not self.enabled:
            return
        for name, records in passed.records.items():
            device = records[0][1].logits.device
            rows = [_sums_of_layer(record, passed.token_mask(layer, record)) for layer, record in records]
            sums = {part: torch.stack([row[part].to(device) for row in rows]) for part in rows[0]}
            before = self.sums.get(name)
            self.sums[name] = {part: before[part] + sums[part] for part in sums} if before else sums
            # Layers that do not know their index are counted.
            indices = [i if layer.layer_idx is None else layer.layer_idx for i, (layer, _) in enumerate(records)]
            self.layers[name] = indices


def _sums_of_layer(record: RouterRecord, mask: torch.Tensor | None) -> Sums:
    """Sums over heads and the tokens of `mask` `[B, S]`: of picks, gates and probabilities `[N]`, of the entropy
    `[1]`, and the number of summands `[1]`.
    """
    top_k, gates = record.share.spec.top_k, record.gates
    log_probs = torch.log_softmax(record.logits, dim=-1, dtype=torch.float32)
    probs = log_probs.exp()
    picks = torch.zeros_like(probs).scatter_(-1, torch.topk(probs, top_k, dim=-1).indices, 1.0)
    entropy = -(probs * log_probs).sum(dim=-1, keepdim=True)
    parts = {"picks": picks, "gates": gates, "probs": probs, "entropy": entropy, "count": torch.ones_like(entropy)}
    sums = {part: values.sum(dim=1) for part, values in parts.items()}  # [B, S, ...]
    if mask is not None:
        sums = {part: values * mask.to(values.device)[..., None] for part, values in sums.items()}
    return {part: values.sum(dim=(0, 1)) for part, values in sums.items()}


def _means(sums: Sums) -> Sums:
    """Means over tokens and heads: `loads` (share of them that picked an expert) and `gates` `[..., N]`, and
    `entropy`, in nats, and `balance_loss` `[...]`.
    """
    loads, gates, probs, entropy = (
        sums[part] / sums["count"].clamp(min=1) for part in ("picks", "gates", "probs", "entropy")
    )
    balance_loss = loads.shape[-1] * (loads * probs).sum(dim=-1)
    return {"loads": loads, "gates": gates, "entropy": entropy[..., 0], "balance_loss": balance_loss}
