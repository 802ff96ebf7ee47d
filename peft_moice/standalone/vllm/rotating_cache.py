"""An attention backend of vLLM for the CPU that keeps keys and values once and rotates keys when it reads them.

The folded layout keeps a copy of keys and values per expert. Here the cache holds what a plain model's holds, and
each step rotates the keys that it reads to each expert's angle: more work per step, for N times as many tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .mixing import Rotations
from .options import BACKEND_NAME, CACHE_OPTION


class RotatingBackend(CPUAttentionBackend):
    """The backend, as vLLM describes one."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["RotatingAttention"]:
        return RotatingAttention

    @staticmethod
    def get_builder_cls() -> type["MetadataBuilder"]:
        return MetadataBuilder


@dataclass
class Metadata:
    """Where the sequences of one step lie.

    Attributes:
        query_starts: per sequence, where its queries begin, and where the last one's end.
        lengths: per sequence, the number of its tokens in the cache once this step's are written.
        block_table: `[sequences, blocks]`, the cache's blocks of each sequence in order.
    """

    query_starts: list[int]
    lengths: list[int]
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class MetadataBuilder(AttentionMetadataBuilder):
    """Makes [`Metadata`]."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        return Metadata(
            common.query_start_loc_cpu.tolist(),
            common.seq_lens.tolist(),
            common.block_table_tensor,
            common.slot_mapping,
        )


class RotatingAttention(AttentionImpl):
    """Attention of N · H query heads, rotated to their experts, over G heads of keys that are rotated when read.

    Args:
        rotations: the layer's further rotations.
        others: as vLLM's `Attention` gives them.

    Raises:
        ValueError: the layer has what is not computed here.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        rotations: Rotations | None = None,
    ):
        lacks = {
            "a soft cap of logits": logits_soft_cap,
            "ALiBi": alibi_slopes,
            f"keys kept as {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        for what, given in lacks.items():
            if given:
                raise ValueError(
                    f"`{CACHE_OPTION}: rotating` does not compute {what}. Leave it out, and the cache keeps a copy of "
                    "keys and values per base angle."
                )
        assert rotations is not None
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.rotations = rotations

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values `[T, G, D]` to the slots of `kv_cache` `[blocks, G, block_size, 2 · D]`."""
        slots = slot_mapping[: key.shape[0]]
        kept = slots >= 0
        slots = slots[kept]
        block_size = kv_cache.shape[2]
        block, place = slots // block_size, slots % block_size
        kv_cache[block, :, place] = torch.cat((key[: kept.shape[0]][kept], value[: kept.shape[0]][kept]), dim=-1)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output` `[T, N · H, D]` for `query` of the same shape."""
        if attn_metadata is None:  # vLLM measures how much memory a step takes
            return output
        starts = attn_metadata.query_starts
        for sequence, length in enumerate(attn_metadata.lengths):
            first, end = starts[sequence], starts[sequence + 1]
            if end > first:
                blocks = attn_metadata.block_table[sequence]
                output[first:end] = self._attend(query[first:end], kv_cache, blocks, length)
        return output

    def _attend(self, query: torch.Tensor, kv_cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """Outputs `[S, N · H, D]` of one sequence's last S tokens, which see its `length` tokens."""
        num_queries, block_size = query.shape[0], kv_cache.shape[2]
        window = self.sliding_window
        first = 0 if window is None else max(0, length - num_queries - window + 1)
        first_block, last_block = first // block_size, (length - 1) // block_size
        pages = kv_cache[blocks[first_block : last_block + 1]]  # [blocks, G, block_size, 2 · D]
        pages = pages.transpose(0, 1).flatten(1, 2)[:, first - first_block * block_size :][:, : length - first]
        key, value = pages.split(self.head_size, dim=-1)  # [G, T, D]
        positions = torch.arange(first, length, device=query.device)
        keys = torch.stack(self.rotations.rotated(key, positions))  # [N, G, T, D]
        num_experts = keys.shape[0]
        queries = query.view(num_queries, num_experts, -1, self.head_size).permute(1, 2, 0, 3)  # [N, H, S, D]
        mask = None
        if num_queries > 1 or window is not None:
            own = torch.arange(length - num_queries, length, device=query.device)[:, None]
            mask = positions <= own
            if window is not None:
                mask &= positions > own - window
        out = F.scaled_dot_product_attention(
            queries, keys, value.expand_as(keys), attn_mask=mask, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(1, 2)
