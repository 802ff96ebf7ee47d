"""One graph for a prompt, one for a step of decoding with a static cache, and exported programs."""

import pytest
import torch
from families import tiny_model, tokens
from position_models import mixture
from test_operator import LAYOUTS, attend, inputs, table
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from peft_moice.attention import mixed_attention
from peft_moice.attention.native import library

ROTATIONS = table(LAYOUTS["half"])
FAMILIES = ["llama", "mistral", "gemma3_text"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_is_one_graph(family):
    model, graphs = mixture(family), CompileCounter()
    expected = model(tokens(), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for seed in (0, 1):
        compiled(tokens(seed=seed), use_cache=False)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_static_cache_takes_no_more_graphs_than_the_base_model(family):
    """One graph, and in transformers 5.23 a second one where a sliding layer counts its keys in Python."""
    model, ids = mixture(family), tokens(length=16)
    expected = model(ids, use_cache=False).logits
    logits, graphs = decode_compiled(model, ids, prompt_length=11)
    torch.testing.assert_close(logits, expected[:, 11:], rtol=0, atol=1e-5 * expected.abs().max().item())
    _, own_graphs = decode_compiled(tiny_model(family), ids, prompt_length=11)
    assert graphs == own_graphs
    assert family != "llama" or graphs == 1


def decode_compiled(model, ids: torch.Tensor, prompt_length: int) -> tuple[torch.Tensor, int]:
    """Logits of all tokens after the prompt, and the number of graphs that decoding them took."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :prompt_length], past_key_values=cache, position_ids=torch.arange(prompt_length)[None])
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    logits = [
        compiled(ids[:, step : step + 1], past_key_values=cache, position_ids=torch.tensor([[step]])).logits
        for step in range(prompt_length, ids.shape[1])
    ]
    return torch.cat(logits, dim=1), graphs.frame_count


@torch.no_grad()
def test_generation_compiles_by_itself_with_a_static_cache():
    model, ids = mixture(), tokens(length=9)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_exported_programs_compute_the_same(merged):
    expected = mixture()(tokens(), use_cache=False).logits
    # One that has not run yet: the first pass is watched.
    model = mixture().merge_and_unload() if merged else mixture().get_base_model()
    program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False)
    # Whoever runs it needs nothing but PyTorch.
    assert not any(node.op == "call_function" and "peft_moice" in str(node.target) for node in program.graph.nodes)
    actual = program.module()(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class TestKernels:
    """Graphs call the kernels for the CPU as an operator, whose cost follows K."""

    pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason="the kernels cannot be had here")

    def test_output_and_gradients_are_those_without_compilation(self):
        for length, keys, only_gates in ((9, 9, False), (2, 30, False), (9, 9, True)):
            tensors = inputs(length, keys)
            leaves = [x.requires_grad_() for x in (tensors[3:] if only_gates else tensors)]
            results = []
            for function in (mixed, torch.compile(mixed, fullgraph=True, backend="aot_eager")):
                output = function(*tensors, query_start=keys - length)
                results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
            for compiled, eager in zip(*results, strict=True):
                assert torch.equal(compiled, eager)

    def test_a_decoding_graph_computes_no_rotation(self):
        """Cosines and sines of all positions, in every step, took many times as long as the rest."""
        operations = []

        def note(graph, example_inputs):
            operations.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
            return graph.forward

        query, key, value, gates = inputs(1, 40)
        start = torch.tensor(39)
        with torch.no_grad():
            compiled = torch.compile(mixed, fullgraph=True, backend=note)(query, key, value, gates, start)
            assert torch.equal(compiled, mixed(query, key, value, gates, start))
        assert any("peft_moice" in name for name in operations)
        assert not any(name.endswith(("cos", "sin")) for name in operations)

    def test_lengths_may_be_dynamic_and_a_position_on_the_device_has_to_fit(self):
        compiled = torch.compile(mixed, fullgraph=True, backend="eager", dynamic=True)
        for length in (9, 12, 15):
            tensors = inputs(length, length)
            assert torch.equal(compiled(*tensors), mixed(*tensors))
        with pytest.raises(ValueError, match="9 queries starting at position 4 do not fit 9 keys"):
            compiled(*inputs(), query_start=torch.tensor(4))


def mixed(query, key, value, gates, query_start=0) -> torch.Tensor:
    options = {"rotations": ROTATIONS, "query_start": query_start, "attend": attend, "backend": "sdpa"}
    return mixed_attention(query, key, value, gates, **options)[0]
