"""Keeps an adapted model near its base model on ordinary text: adapters should change only what they have to."""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .hooks import aside
from .loss_parts import LossPartsMixin


def divergence_from_base(model: nn.Module, adapted: PeftModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Divergence KL(base || adapted) of an adapted model from its base model, mean over tokens in nats: a scalar.

    Both passes draw the same random numbers, so what NEFTune adds to the embeddings is no divergence.

    Args:
        model: what computes the adapted model's logits: `adapted` itself, or a wrapper for several processes.
        adapted: the PEFT model, whose adapters are switched off for the base model's logits.
        input_ids: token ids `[B, S]` of ordinary text.
    """
    with aside(adapted):
        devices = [adapted.device] if adapted.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), adapted.disable_adapter():
            base = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        log_probs = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    return nn.functional.kl_div(log_probs, base, log_target=True, reduction="batchmean")


class KeepCloseMixin(LossPartsMixin):
    """Mixed into a Trainer of any adapter: adds the divergence (KL) from the base model on ordinary text to the loss.

    Every micro-batch draws one stretch of the text by Python's global random state, which Trainer seeds and restores.
    Logged as `loss/divergence`, see [`LossPartsMixin`]. Costs a pass of the base model and one of the adapted model
    with its gradients, over `keep_tokens` tokens.

    ```python
    class CloseTrainer(KeepCloseMixin, SFTTrainer):
        pass


    trainer = CloseTrainer(keep_text=Path("notes.txt").read_text(), keep_weight=2.0, model=model, ...)
    ```

    Args:
        keep_text: ordinary text, tokenized by the trainer's `processing_class`, or the ids `[T]` of its tokens; more
            than `keep_tokens` of them. Needed unless `keep_weight` is 0.
        keep_weight: weight of the divergence; 0 switches it off. Default: 2.
        keep_tokens: length S of a stretch. Default: 256.

    Raises:
        ValueError: a value out of its range, or too little text.
        TypeError: text without a tokenizer, or `keep_text` is neither text nor ids; at the first step, the model is no
            PEFT model.
    """

    def __init__(
        self,
        *args: Any,
        keep_text: str | Sequence[int] | torch.Tensor | None = None,
        keep_weight: float = 2.0,
        keep_tokens: int = 256,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.keep_weight, self.keep_tokens = keep_weight, keep_tokens
        self.keep_ids: torch.Tensor | None = None
        if not 0 <= keep_weight < math.inf or keep_tokens < 2:
            raise ValueError(
                f"`keep_weight` {keep_weight} has to be finite and at least 0, `keep_tokens` {keep_tokens} at least 2."
            )
        if keep_weight > 0:
            self.keep_ids = text_ids(keep_text, getattr(self, "processing_class", None))
            check_enough_text(self.keep_ids, keep_weight, keep_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self.keep_ids is None or not model.training:
            return result
        # Below the wrappers of several processes and of `torch.compile`.
        adapted = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
        if adapted is None:
            name = type(self.accelerator.unwrap_model(model)).__name__
            raise TypeError(f"KeepCloseMixin needs a PEFT model, not {name}. Make one with `peft.get_peft_model`.")
        start = random.randrange(len(self.keep_ids) - self.keep_tokens)
        stretch = self.keep_ids[None, start : start + self.keep_tokens].to(adapted.device)
        added = self.keep_weight * divergence_from_base(model, adapted, stretch)
        if self.loss_is_a_sum(num_items_in_batch):
            added = added / self.current_gradient_accumulation_steps
        return self.add_part(result, "divergence", added, num_items_in_batch, return_outputs)


def text_ids(text: str | Sequence[int] | torch.Tensor | None, tokenizer: Any) -> torch.Tensor:
    """Token ids of `text`, which may be ids already.

    Raises:
        TypeError: it is text, and there is no tokenizer; or it is neither text nor ids in one row.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("`keep_text` is text, but the trainer has no `processing_class`. Give one, or token ids.")
        text = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        ids = torch.as_tensor([] if text is None else text, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        ids = None  # texts, or rows of different lengths
    if ids is None or ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex())):
        shape = "" if ids is None else f" with the shape {tuple(ids.shape)} and {ids.dtype}"
        raise TypeError(
            f"`keep_text` has to be one text, or the ids of its tokens in one row, not {type(text).__name__}{shape}. "
            "Join several texts; of ids `[1, T]`, give row 0."
        )
    return ids.long()


def check_enough_text(ids: torch.Tensor, keep_weight: float, keep_tokens: int) -> None:
    """Raise a ValueError where `ids` are too few to draw `keep_tokens` of them."""
    if len(ids) <= keep_tokens:
        raise ValueError(
            f"`keep_weight` {keep_weight:g} needs more than {keep_tokens} tokens of ordinary text (`keep_tokens`), "
            f"but there are {len(ids)}. Give more text, lower `keep_tokens`, or set `keep_weight` to 0."
        )
