"""The routers and ropes by position of an attention module in vLLM, and the attention function that applies them.

The N experts are further heads of one call of vLLM's attention, as in `attention/folded.py`. vLLM computes many
sequences in one row and tells every token's place in its own. Rotations by that place are right whatever the cache
holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.transformers import vllm_attention_forward
from vllm.model_executor.utils import set_weight_attrs

from ...rope.rotation import rotate
from ...routing.mixture import LayerMixture
from ..built_in import ROUTERS_NAME, shares_of
from ..installing import DescribedLayer

ATTENTION_NAME = "moice_vllm"
"""Name of [`attention_forward`] in transformers' attention interface."""


class ServedRouters(nn.ModuleList):
    """The routers of one attention module, for the query heads of this process, and its ropes by position.

    Args:
        layer: what the config says of them.
        max_length: T, the most tokens of a sequence.
        device: where the model runs.

    Raises:
        ValueError: the heads cannot be divided among the processes of tensor parallelism.
    """

    def __init__(self, layer: DescribedLayer, max_length: int, device: torch.device):
        world_size = get_tensor_model_parallel_world_size()
        num_heads = layer.described.num_heads
        if num_heads % world_size:
            raise ValueError(
                f"The {num_heads} heads of {layer.name} cannot be divided among {world_size} processes. Choose "
                "a --tensor-parallel-size that divides them."
            )
        routers = layer.routers(num_heads // world_size)
        super().__init__(router.to(device, torch.float32).requires_grad_(False) for router in routers)
        for name, parameter in self.named_parameters():
            set_weight_attrs(parameter, {"weight_loader": _loader(f"{layer.name}.{ROUTERS_NAME}.{name}")})
        self.name = layer.name
        self.specs = layer.described.specs
        self.rope = layer.rope
        self.by_position = layer.by_position
        self.experts = self._mixture().experts_by_position()
        table = layer.rope.table(self.experts)
        self.layout, self.is_identity = table.layout, table.is_identity
        # What attention scaling, as YaRN has it, makes of scores.
        self.factors = (1.0,) * self.num_experts if table.far is None else table.far.factors[: self.num_experts]
        cos, sin = (x[: self.num_experts] for x in table.cos_sin(max_length, device))  # [N, T, P]
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def num_experts(self) -> int:
        """N, the number of base angles that some router of the layer can pick, and of ropes by position."""
        return len(self.experts)

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
        """`x` `[1, H, S, D]` under each of the N experts and times its factor, `[1, N · H, S, D]`, for tokens at
        `positions` `[S]`."""
        cos: Any = self.cos
        sin: Any = self.sin
        rotated = [
            x
            if unchanged and factor == 1
            else rotate(x, cos[expert, positions] * factor, sin[expert, positions] * factor, self.layout)
            for expert, (unchanged, factor) in enumerate(zip(self.is_identity, factors, strict=True))
        ]
        return torch.cat(rotated, dim=1)

    def _mixture(self) -> LayerMixture:
        return LayerMixture(shares_of(self, self.specs), self.rope, by_position=self.by_position)

    def _gates(self, query: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[H, S, N]` for queries `[1, H, S, D]` at `ids` `[1, S]`."""
        mixture = self._mixture()
        if self.by_position is None:
            return mixture.gate(query, mixture.rope_bases()).gates[0]
        return mixture.gate_by_position(query, ids, self.by_position.experts).gates[0]

    def mix(
        self, attend: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The mixture's output `[1, T, H, D]`.

        Args:
            attend: vLLM's attention, for N times as many heads.
            query: `[1, H, T, D]`, carrying the model's own rotation.
            key: `[1, G, T, D]`, likewise.
            value: `[1, G, T, D]`.
            options: keyword arguments of the attention function, among them `position_ids` `[1, T]`.

        Raises:
            ValueError: there are no `position_ids` of one dimension.
        """
        ids = options.get("position_ids")
        if ids is None or ids.dim() != 2:
            raise ValueError(
                f"The attention module {self.name!r} does not tell where its tokens stand (`position_ids` of one "
                "dimension), so MoICE cannot rotate them. This model is not served by vLLM; use transformers."
            )
        gates = self._gates(query, ids)
        queries = self._rotated(query, ids[0], self.factors)
        keys = self._rotated(key, ids[0], (1.0,) * self.num_experts)
        output, _ = attend(queries, keys, value.repeat(1, self.num_experts, 1, 1), None, **options)
        output = output.view(gates.shape[1], self.num_experts, gates.shape[0], -1)  # [T, N, H, D]
        return torch.einsum("htn,tnhd->thd", gates, output.float()).to(query.dtype)[None]


def _loader(name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """What vLLM calls to fill a router's parameter, which may hold the heads of one process only."""

    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        # vLLM exchanges the argument `param` by its name when it loads weights anew.
        size = param.shape[0]
        has_heads = param.dim() in (1, 3)
        if has_heads and loaded_weight.shape[0] == size * get_tensor_model_parallel_world_size():
            loaded_weight = loaded_weight.narrow(0, get_tensor_model_parallel_rank() * size, size)
        if loaded_weight.shape != param.shape:
            raise ValueError(
                f"The checkpoint has {name} of shape {tuple(loaded_weight.shape)}, but the config describes routers "
                f"with {tuple(param.shape)}. Its files do not belong together: merge the adapter again."
            )
        if not loaded_weight.isfinite().all():
            raise ValueError(
                f"The checkpoint has {name} with values that are not finite. The files are damaged, or training has "
                "failed: get them anew, or merge an earlier checkpoint."
            )
        param.data.copy_(loaded_weight)

    return load


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The attention function of merged models in vLLM; vLLM's own in layers without routers."""
    routers: Any = getattr(module, ROUTERS_NAME, None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        return vllm_attention_forward(module, q, k, v, mask, **options)

    if routers is None:
        output: tuple[torch.Tensor, None] = attend(query, key, value, attention_mask, **kwargs)
        return output
    return routers.mix(attend, query, key, value, **kwargs), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
