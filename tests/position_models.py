"""Models for tests of positions: one base angle beside a model built with that `rope_theta`, and mixtures."""

import torch
from families import tiny_model
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from peft_moice import MoICEConfig

FACTOR = 4.0


def rotated(family: str = "llama", **overrides):
    """A model built with another `rope_theta`, with which [`one_angle`] has to agree."""
    return tiny_model(family, FACTOR, eos_token_id=None, **overrides)


def one_angle(family: str = "llama", **overrides) -> PeftModel:
    """A model with one expert, at the base angle of [`rotated`]."""
    base = tiny_model(family, eos_token_id=None, **overrides)
    return get_peft_model(base, MoICEConfig(base_multipliers=[FACTOR])).eval()


def mixture(family: str = "llama", **options) -> PeftModel:
    """A model that mixes three angles, two of them per token. Options are those of the adapter and of the model."""
    torch.manual_seed(1)
    own = {name: options.pop(name) for name in list(options) if hasattr(MoICEConfig, name)}
    config = MoICEConfig(base_multipliers=[1.0, 4.0, 0.25], top_k=2, init_weights=False, **own)
    return get_peft_model(tiny_model(family, eos_token_id=None, **options), config).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def cached_logits(model, ids: torch.Tensor, prompt_length: int, cache=None) -> torch.Tensor:
    """Logits of `ids`: a prompt at once, then the rest one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = ids.split((prompt_length, *([1] * (ids.shape[1] - prompt_length))), dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens of a padded batch, as `generate` numbers them."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def additive(visible: torch.Tensor) -> torch.Tensor:
    """An additive mask `[B, 1, S, T]` that shows the `visible` keys."""
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


class Waits(TorchDispatchMode):
    """Counts how often Python asks a tensor for its value, for which it would have to wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
