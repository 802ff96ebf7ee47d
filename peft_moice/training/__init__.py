"""The balance loss on its way into the training loss, and the router logits on theirs to the caller."""

from .balance_outside import BalanceLossMixin, CollectedBalanceLoss, collect_balance_loss
from .hooks import add_balance_loss, register_hooks, remove_hooks
from .keep_close import KeepCloseMixin, divergence_from_base
from .loss_parts import LossPartsMixin

__all__ = [
    "BalanceLossMixin",
    "CollectedBalanceLoss",
    "KeepCloseMixin",
    "LossPartsMixin",
    "add_balance_loss",
    "collect_balance_loss",
    "divergence_from_base",
    "register_hooks",
    "remove_hooks",
]
