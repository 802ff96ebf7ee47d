"""Keeps an adapted model near its base model on ordinary text: adapters should change only what they have to."""

import random

import torch


def distance_from_base(model, adapted, text_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Divergence (KL) of the adapted model from the base model, mean over a random stretch of text, in nats.

    Args:
        model: what computes the adapted model's logits, possibly wrapped for several processes.
        adapted: the PEFT model itself, whose adapter is switched off for the base model's logits.
        text_ids: token ids of the text, more than `num_tokens`.
        num_tokens: length of the stretch.
    """
    start = random.randrange(len(text_ids) - num_tokens)
    text = text_ids[None, start : start + num_tokens].to(adapted.device)
    with torch.no_grad(), adapted.disable_adapter():
        base = model(input_ids=text, use_cache=False).logits[0].float().log_softmax(-1)
    log_probs = model(input_ids=text, use_cache=False).logits[0].float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_probs, base, log_target=True, reduction="batchmean")
