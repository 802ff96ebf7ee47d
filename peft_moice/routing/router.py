"""The router: query vectors in, expert logits and gates out; and the loss that balances the experts."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN

from .spec import RouterSpec

INITIALIZER_RANGE = 0.02
"""Standard deviation of the initial router weights in the official code."""


class MoICERouter(nn.Module):
    """Scores `num_experts` rotary base angles for every head and token (paper, section 3.2).

    Computes `down( act(gate(q)) * up(q) )` without biases on query vectors that already carry the model's own
    rotation. With `num_heads=None` one set of weights serves all heads of the layer, as in the official code; the
    scores still differ from head to head, because the queries do. With a number, every head has weights of its own.

    Args:
        head_dim: size D of a query vector.
        num_experts: number N of base angles.
        router_dim: hidden size R. The official code uses R = N.
        hidden_act: name of the activation in transformers' `ACT2FN`.
        num_heads: H for one router per head, None (default) for one router per layer.
        identity_heads: H to add the identity-start scale, see [`MoICEConfig`]. Default: None, no scale.

    Parameters (leading H only with `num_heads`): `gate_proj` and `up_proj` `[H, R, D]`, `down_proj` `[H, N, R]`,
    `identity_scale` `[H]`.
    """

    def __init__(
        self,
        head_dim: int,
        num_experts: int,
        router_dim: int,
        hidden_act: str,
        num_heads: int | None = None,
        identity_heads: int | None = None,
    ):
        super().__init__()
        heads = () if num_heads is None else (num_heads,)
        self.gate_proj = nn.Parameter(torch.empty(*heads, router_dim, head_dim))
        self.up_proj = nn.Parameter(torch.empty(*heads, router_dim, head_dim))
        self.down_proj = nn.Parameter(torch.empty(*heads, num_experts, router_dim))
        self.identity_scale = None if identity_heads is None else nn.Parameter(torch.empty(identity_heads))
        self.hidden_act = hidden_act
        self.act_fn = ACT2FN[hidden_act]

    @classmethod
    def from_spec(cls, spec: RouterSpec, layer_type: str | None, num_heads: int, head_dim: int) -> "MoICERouter":
        """A router as `spec` describes it, in a layer of H = `num_heads` query heads of size D = `head_dim`."""
        return cls(
            head_dim,
            len(spec.bases_of(layer_type)),
            spec.router_dim,
            spec.hidden_act,
            num_heads=num_heads if spec.router_scope == "head" else None,
            identity_heads=num_heads if spec.identity else None,
        )

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[-2]

    @property
    def is_trainable(self) -> bool:
        # Not `parameters()`: during a forward pass, FSDP1 has plain tensors in their place.
        return self.gate_proj.requires_grad or self.up_proj.requires_grad or self.down_proj.requires_grad

    @property
    def head_dim(self) -> int:
        return self.gate_proj.shape[-1]

    def reset_parameters(self, init_weights: bool | str = True) -> None:
        """Fill the weights: normal(0, 0.02) as in the official code, or wider with `init_weights=False`.

        False draws the weights from uniform(±1/√fan_in), PyTorch's own start for linear layers, which makes the
        router decide from the first step on. The identity scale always starts at zero, except with False: then at
        one, the full mixture.
        """
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            if init_weights:
                nn.init.normal_(weight, std=INITIALIZER_RANGE)
            else:
                bound = weight.shape[-1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
        if self.identity_scale is not None:
            nn.init.constant_(self.identity_scale, 0.0 if init_weights else 1.0)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """Expert logits `[B, H, S, N]` of `query` `[B, H, S, D]`."""
        gate_proj, up_proj, down_proj = self.gate_proj, self.up_proj, self.down_proj
        query = query.to(gate_proj.dtype)
        if gate_proj.dim() == 2:
            linear = nn.functional.linear
            return linear(self.act_fn(linear(query, gate_proj)) * linear(query, up_proj), down_proj)
        hidden = self.act_fn(query @ gate_proj.mT) * (query @ up_proj.mT)
        logits: torch.Tensor = hidden @ down_proj.mT
        return logits

    def gates(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        """Gates `[B, H, S, N]` in float32 from `logits` `[B, H, S, N]`, with the identity scale applied.

        Raises:
            ValueError: the identity scale is offloaded.
        """
        gates = select_experts(logits, top_k)
        if self.identity_scale is None:
            return gates
        if self.identity_scale.is_meta and not gates.is_meta:
            raise ValueError(
                "The weights of a router are offloaded, and accelerate brings them back for its `forward` alone, "
                "without the identity scale. Offload the base model first, and add or load the adapter afterwards."
            )
        scale = self.identity_scale.float()[:, None, None]
        own = gates.new_zeros(gates.shape[-1])
        own[0] = 1.0
        return own + scale * (gates - own)

    def picks(self, logits: torch.Tensor, top_k: int) -> torch.Tensor | None:
        """`[B, H, S, N]`, true where the gates of `logits` have a gradient; None for where they are not zero.

        An identity scale of zero closes gates by which it learns all the same: those that `top_k` kept.
        """
        if self.identity_scale is None or not self.identity_scale.requires_grad:
            return None
        picked = select_experts(logits.detach(), top_k) != 0
        picked[..., 0] = True
        return picked

    def extra_repr(self) -> str:
        scope = "layer" if self.gate_proj.dim() == 2 else "head"
        return (
            f"head_dim={self.gate_proj.shape[-1]}, router_dim={self.gate_proj.shape[-2]}, "
            f"num_experts={self.num_experts}, scope={scope}, identity={self.identity_scale is not None}"
        )


def check_size(
    specs: Sequence[RouterSpec], layer_type: str | None, num_heads: int, head_dim: int, attention: nn.Module
) -> None:
    """Raise before a layer's routers are made, if they would be larger than the attention module that they are for.

    No config that was chosen by anyone asks for that, so it is a mistake or an attack. Routers of a million weights
    are let pass whatever the attention module.

    Raises:
        ValueError: they would.
    """
    numels = []
    for spec in specs:
        copies = num_heads if spec.router_scope == "head" else 1
        numels.append(copies * spec.router_dim * (2 * head_dim + len(spec.bases_of(layer_type))))
    # Where DeepSpeed spreads weights over processes, they are empty here.
    limit = max(2**20, sum(getattr(weight, "ds_numel", weight.numel()) for weight in attention.parameters()))
    if sum(numels) > limit:
        raise ValueError(
            f"The config asks for routers of {sum(numels):,} weights in a layer whose attention module has room for "
            f"{limit:,}. Lower `router_dim` ({max(spec.router_dim for spec in specs)}) or the number of angles; if "
            "the config was read from a file, that is damaged."
        )


def select_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Turn expert logits `[..., N]` into gates `[..., N]` in float32 that sum to one.

    Softmax over all N, the `top_k` largest kept, the rest set to zero, renormalised.
    """
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if top_k == logits.shape[-1]:
        return probs
    weights, chosen = torch.topk(probs, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, chosen, weights)


def balance_loss(
    router_logits: list[torch.Tensor], top_k: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Load-balancing loss over layers, heads and tokens (Switch Transformers, eq. 4; Mixtral's form).

    `N · Σ_i f_i · P_i`, with f_i the share of rows that have expert i among their `top_k` and P_i the mean
    probability of expert i over all N. With `top_k` equal to N every f_i is one, so the loss is the constant N.

    Args:
        router_logits: one tensor `[B, H, S, N]` per layer.
        top_k: number of experts that each row keeps.
        token_mask: `[B, S]`, true or non-zero where a token counts. Default: all count, as in the official code.

    Returns:
        A float32 scalar.
    """
    masks = [token_mask] * len(router_logits)
    return balance_losses(router_logits, top_k, masks, lambda values: values.sum(dim=(0, 1))[None])[0]


def balance_losses(
    router_logits: list[torch.Tensor],
    top_k: int,
    token_masks: list[torch.Tensor | None],
    sum_tokens: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The [`balance_loss`] of each of M groups of tokens on its own, `[M]` in float32; 0 for a group without tokens.

    Args:
        router_logits: one tensor `[B, H, S, N]` per layer; S may differ from layer to layer.
        top_k: as for [`balance_loss`].
        token_masks: one mask `[B, S]` per layer, or None where all tokens count.
        sum_tokens: maps values `[B, S, ...]` of tokens to their sums `[M, ...]` over the tokens of each group.
    """
    device, num_experts = router_logits[0].device, router_logits[0].shape[-1]
    chosen, probs, rows = (torch.zeros((), device=device) for _ in range(3))
    for logits, mask in zip(router_logits, token_masks, strict=True):
        batch, heads, length, _ = logits.shape
        counts = torch.ones(batch, length, device=logits.device)
        if mask is not None:
            counts = counts * mask.to(logits.device)
        layer_probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
        picks = torch.topk(layer_probs, top_k, dim=-1).indices
        layer_chosen = torch.zeros_like(layer_probs).scatter_(-1, picks, 1.0)
        chosen = chosen + sum_tokens(layer_chosen.sum(dim=1) * counts[..., None]).to(device)  # [M, N]
        probs = probs + sum_tokens(layer_probs.sum(dim=1) * counts[..., None]).to(device)
        rows = rows + heads * sum_tokens(counts).to(device)  # [M]
    rows = rows.clamp(min=1.0)[:, None]
    return num_experts * torch.sum((chosen / rows) * (probs / rows), dim=-1)
