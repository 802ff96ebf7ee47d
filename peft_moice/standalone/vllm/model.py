"""Merged models in vLLM: its own backend for transformers' models, whose attention mixes several base angles."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from ..built_in import ROUTERS_NAME
from ..installing import described_layers
from .mixing import ATTENTION_NAME, ServedRouters
from .refusals import refuse_unserved


class ServedModel(TransformersForCausalLM):
    """What [`MoICEForCausalLM`] and [`MoICEMoEForCausalLM`] share. vLLM calls the methods in the order below.

    Raises:
        ValueError: the model cannot be served, or not with these options; says why.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "Models with MoICE routers are not served with pipeline parallelism. Use --tensor-parallel-size."
            )
        refuse_unserved(vllm_config.model_config.hf_config)  # again, as --hf-overrides may have changed it
        self._has_weights = vllm_config.load_config.load_format == "dummy"
        self._routers: dict[str, ServedRouters] = {}
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        # Before vLLM's layers take the place of transformers', which the description was written for.
        self._layers = list(described_layers(self.model, self.config.moice))
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        by_name: dict[str, ServedRouters] = {}
        for layer in self._layers:
            routers = ServedRouters(layer, self.model_config.max_model_len, self.device_config.device)
            name = maybe_prefix("model", layer.name)
            self._routers[f"{maybe_prefix(prefix, name)}.attn"] = routers
            by_name[name] = routers
        super()._create_attention_instances(prefix)
        for name, routers in by_name.items():
            setattr(self.get_submodule(name), ROUTERS_NAME, routers)
        # Not earlier: until here, vLLM tells attention modules by the name of its own function.
        self.text_config._attn_implementation = ATTENTION_NAME

    def _get_attn_cls(self) -> Any:
        attention_class = super()._get_attn_cls()
        if attention_class is not Attention:
            raise ValueError(
                f"vLLM computes this model with {attention_class.__name__}, and MoICE routers need plain attention. "
                "Use transformers."
            )
        return self._make_attention

    def _make_attention(self, *, prefix: str, **options: Any) -> Attention:
        """vLLM's attention of one layer, with N times as many heads where the layer has routers."""
        routers = self._routers.get(prefix)
        if routers is None:
            return Attention(prefix=prefix, **options)
        if options.get("sinks") is not None:
            raise ValueError(
                f"The attention of {routers.name} has sinks, with which MoICE routers are not served by vLLM. Use "
                "transformers."
            )
        options["num_heads"] *= routers.num_experts
        options["num_kv_heads"] *= routers.num_experts
        attention = Attention(prefix=prefix, **options)
        _refuse_wide_counts(attention)
        return attention

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        lacking = sorted(
            name for name, _ in self.named_parameters() if f".{ROUTERS_NAME}." in name and name not in loaded
        )
        # Only the first call brings a whole checkpoint. Trainers that hold an engine send weights one by one.
        if lacking and not self._has_weights:
            raise ValueError(
                f"The checkpoint lacks {len(lacking)} weights of routers that its config describes, the first of "
                f"them {lacking[0]!r}. Its files do not belong together: merge the adapter again."
            )
        self._has_weights = True
        return loaded


class MoICEForCausalLM(ServedModel):
    """A merged causal language model."""


class MoICEMoEForCausalLM(ServedModel, TransformersMoEForCausalLM):
    """A merged causal language model whose feed-forward layers are mixtures of experts."""


def _refuse_wide_counts(attention: Attention) -> None:
    """Refuse attention backends that plan with the model's number of heads, where this layer has N times as many."""
    builder = attention.attn_backend.get_builder_cls()
    if not hasattr(sys.modules[builder.__module__], "get_num_attention_heads_from_layers"):
        raise ValueError(
            f"The attention backend {attention.attn_backend.get_name()} takes all layers to have the model's number "
            "of heads, and layers with MoICE routers have more. Choose another, such as `--attention-backend "
            "FLASH_ATTN`."
        )
