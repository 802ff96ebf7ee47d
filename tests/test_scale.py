"""The counts in docs/speed.md agree with a model that runs."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from versions import needs_transformers

from peft_moice import MoICEConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import estimate_scale

SHAPE = estimate_scale.Shape("tiny", 2, 64, 4, 2, 128, 96, 64)
TOKENS = 64


def model(experts: int, scope: str = "layer", backend: str = "eager", **options):
    config = LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        attn_implementation=backend,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    if not experts:
        return base
    multipliers = [1 + 0.1 * index for index in range(experts)]
    routers = MoICEConfig(base_multipliers=multipliers, router_scope=scope, task_type="CAUSAL_LM", **options)
    return get_peft_model(base, routers)


def saved_bytes(experts: int) -> int:
    """Bytes of the distinct queries, keys, values and outputs that are kept for backward."""
    # As on a GPU; the kernels for the CPU keep nothing but their inputs.
    adapted, sizes = model(experts, backend="sdpa", implementation="delegated").train(), {}
    kept = []  # so that no two tensors have the same address

    def pack(tensor):
        kept.append(tensor)
        if tensor.shape[-1:] == (SHAPE.head_dim,) and tensor.dtype == torch.bfloat16:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embedded = torch.randn(1, TOKENS, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(inputs_embeds=embedded, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("experts", [2, 7])
def test_weights(experts, scope):
    trainable, total = model(experts, scope).get_nb_trainable_parameters()
    assert trainable == estimate_scale.router_weights(SHAPE, experts, per_head=scope == "head")
    assert total - trainable == SHAPE.weights


@needs_transformers("5.19", "computes the rotary angles by a matrix product, which is counted")
@pytest.mark.parametrize("experts", [0, 2, 7])
def test_operations_of_a_forward_pass(experts):
    counted = model(experts)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    expected = estimate_scale.linear_operations(SHAPE, TOKENS)
    # Attention that is not fused computes both triangles.
    expected += estimate_scale.attention_operations(SHAPE, TOKENS, max(experts, 1), causal=False)
    if experts:
        expected += estimate_scale.router_operations(SHAPE, TOKENS, experts)
    assert counter.get_total_flops() == expected


def test_bytes_that_mixing_keeps():
    more = saved_bytes(8) - saved_bytes(3)
    assert more == SHAPE.layers * estimate_scale.saved_by_mixing(SHAPE, TOKENS, 5)
