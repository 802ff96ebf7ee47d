"""Properties of the operator, for every implementation."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from representatives import slow_but

from peft_moice.attention import IMPLEMENTATIONS, mixed_attention
from peft_moice.attention.native import kernel
from peft_moice.rope import RotaryLayout, RotationTable, rotate
from peft_moice.routing.router import select_experts

LAYOUTS = {
    "half": RotaryLayout(0, 8, False),
    "interleaved": RotaryLayout(0, 8, True),
    "partial": RotaryLayout(0, 4, False),
    "last": RotaryLayout(4, 4, True),
}
BASES = (10.0, 25.0, 100.0)
RUNNABLE = sorted(IMPLEMENTATIONS)
if os.environ.get("TRITON_INTERPRET") != "1":
    RUNNABLE.remove("triton")  # see test_triton.py


@pytest.fixture(params=RUNNABLE)
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request) -> RotaryLayout:
    return LAYOUTS[request.param]


def frequencies(base: float, layout: RotaryLayout) -> torch.Tensor:
    return base ** (-torch.arange(0, layout.size, 2, dtype=torch.float64) / layout.size)


def table(layout: RotaryLayout, bases: tuple[float, ...] = BASES) -> RotationTable:
    own = frequencies(bases[0], layout)
    return RotationTable(torch.stack([frequencies(base, layout) - own for base in bases]), layout)


def turn(x: torch.Tensor, base: float, layout: RotaryLayout, start: int = 0) -> torch.Tensor:
    positions = torch.arange(start, start + x.shape[-2], dtype=torch.float64)
    angles = positions[:, None] * frequencies(base, layout)
    return rotate(x, angles.cos().float(), angles.sin().float(), layout)


def attend(query, key, value, attention_mask, **kwargs):
    """Causal attention with probabilities, in the form of transformers' eager attention."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * query.shape[-1] ** -0.5
    if attention_mask is None:
        offset = key.shape[-2] - query.shape[-2]
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(offset)
    probs = scores.masked_fill(~attention_mask, -torch.inf).softmax(dim=-1)
    return (probs @ value.repeat_interleave(groups, 1)).transpose(1, 2), probs


def inputs(queries: int = 9, keys: int = 9, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key = torch.randn(2, 2, keys, 8, generator=generator)
    value = torch.randn(2, 2, keys, 6, generator=generator)
    gates = select_experts(torch.randn(2, 4, queries, len(BASES), generator=generator), 2)
    return query, key, value, gates


def mix(implementation: str, *tensors: torch.Tensor, layout: RotaryLayout = LAYOUTS["half"], **options):
    """Output and probabilities of queries, keys and values that were rotated by the first base angle, and gates."""
    options = {"rotations": table(layout), "attend": attend, "implementation": implementation, **options}
    return mixed_attention(*tensors, **options)


def test_equals_attention_of_vectors_rotated_once(implementation, layout):
    """Re-rotation from the cache is the definition: each expert rotates the unrotated vectors by its own angle."""
    query, key, value, gates = inputs()
    expected = sum(
        gates[..., j, None].transpose(1, 2)
        * attend(turn(query, base, layout), turn(key, base, layout), value, None)[0]
        for j, base in enumerate(BASES)
    )
    turned = turn(query, BASES[0], layout), turn(key, BASES[0], layout), value, gates
    output, _ = mix(implementation, *turned, layout=layout, query_start=0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_only_differences_of_positions_matter(implementation, layout):
    """A sequence whose keys carry shifted positions (left padding, a sliding cache) gives the same output."""
    query, key, value, gates = inputs()
    outputs = []
    for shift in (0, 1000):
        turned = turn(query, BASES[0], layout, shift), turn(key, BASES[0], layout, shift), value, gates
        outputs.append(mix(implementation, *turned, layout=layout, query_start=0)[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_segments_equal_the_whole(implementation):
    layout = LAYOUTS["half"]
    query, key, value, gates = inputs(12, 12)
    query, key = turn(query, BASES[0], layout), turn(key, BASES[0], layout)
    whole, probs = mix(implementation, query, key, value, gates, query_start=0)
    for start, end in ((0, 5), (5, 11), (11, 12)):
        tensors = query[..., start:end, :], key[..., :end, :], value[..., :end, :], gates[..., start:end, :]
        part, part_probs = mix(implementation, *tensors, query_start=start)
        torch.testing.assert_close(part, whole[:, start:end], rtol=1e-5, atol=1e-6)
        if probs is not None:
            torch.testing.assert_close(part_probs, probs[..., start:end, :end], rtol=1e-5, atol=1e-6)


def test_query_start_as_a_tensor(implementation):
    expected, _ = mix(implementation, *inputs(3, 9), query_start=6)
    actual, _ = mix(implementation, *inputs(3, 9), query_start=torch.tensor(6))
    assert torch.equal(actual, expected)


def test_the_own_angle_alone_is_bitwise_the_models_attention():
    query, key, value, _ = inputs()
    gates = torch.ones(2, 4, 9, 1)
    rotations = table(LAYOUTS["half"], BASES[:1])
    output, probs = mixed_attention(query, key, value, gates, rotations=rotations, query_start=0, attend=attend)
    expected, expected_probs = attend(query, key, value, None)
    assert torch.equal(output, expected)
    assert torch.equal(probs, expected_probs)


def sdpa_of_rotated(query, key, value, gates, layout, **options) -> torch.Tensor:
    """The mixture of PyTorch's own attention over vectors rotated once, each expert by its own base angle."""
    output = 0.0
    for j, base in enumerate(BASES):
        q, k = (turn(query, base, layout, key.shape[2] - query.shape[2]), turn(key, base, layout))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, value, enable_gqa=True, **options)
        output = output + gates[..., j, None] * attended
    return output.transpose(1, 2)


def strange_masks(queries: int, keys: int) -> dict[str, torch.Tensor]:
    """Masks that are not causal, of every shape that broadcasts."""
    generator = torch.Generator().manual_seed(queries)
    allowed = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
    allowed[..., 0] = True
    sees_nothing = allowed.clone()
    sees_nothing[1, :, queries // 2] = False
    lowest = torch.finfo(torch.float32).min
    return {
        "later keys": allowed,
        "later keys, additive": torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf),
        "a bias": torch.randn(2, 4, queries, keys, generator=generator),
        "for all heads and rows": allowed[:1],
        "for all queries": allowed[:, :, :1],
        "for all keys": torch.randn(2, 1, queries, 1, generator=generator),
        "nothing hidden": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "nothing seen": sees_nothing,
        "nothing seen, additive": torch.zeros(allowed.shape).masked_fill(~sees_nothing, -torch.inf),
        "all the lowest number": torch.zeros(allowed.shape).masked_fill(~sees_nothing, lowest),
        "strides": allowed.expand(2, 4, queries, keys).transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("queries", slow_but([1, 9], [1, 3, 8, 9, 20]))
@pytest.mark.parametrize("kind", [*strange_masks(1, 1), None])
def test_masks_that_are_not_causal(implementation, kind, queries):
    """As in PyTorch's attention; None shows every key."""
    if implementation == "triton":
        pytest.skip("see test_triton.py")
    query, key, value, gates = inputs(queries, 20)
    mask = None if kind is None else strange_masks(queries, 20)[kind]
    layout = LAYOUTS["half"]

    def attend_by_sdpa(query, key, value, mask, is_causal):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2), None

    found = []
    for of_ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, gates)]
        if of_ours:
            start = 20 - queries
            turned = turn(leaves[0], BASES[0], layout, start), turn(leaves[1], BASES[0], layout), *leaves[2:]
            options = {"attention_mask": mask, "is_causal": False, "attend": attend_by_sdpa}
            output, _ = mix(implementation, *turned, query_start=start, **options)
        else:
            output = sdpa_of_rotated(*leaves, layout, attn_mask=mask)
        weight = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
        *grads, grad_gates = torch.autograd.grad((output * weight).sum(), leaves)
        found.append((output, *grads, grad_gates * (gates != 0)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [3, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
def test_what_is_not_a_number_is_not_hidden(implementation, tensor, bad, queries):
    """Where PyTorch's attention gives none, ours gives none; gradients likewise."""
    if implementation == "triton":
        pytest.skip("see test_triton.py")
    query, key, value, gates = inputs(queries, 9)
    gates = gates.abs().clamp(min=0.1)
    {"query": query, "key": key, "value": value}[tensor][0, 1, -2, 3] = bad
    leaves = [x.requires_grad_() for x in (query, key, value, gates)]
    output, _ = mix(implementation, *leaves, query_start=9 - queries)
    mask = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    expected = sdpa_of_rotated(query, key, value, gates, LAYOUTS["half"], attn_mask=mask)
    # Rows that do not see the number may have one or not (zero times infinity), as the blocks fall.
    output, expected = output[:, -2:], expected[:, -2:]
    assert not expected.isfinite().all()
    assert torch.equal(output.isfinite(), expected.isfinite())
    grads = torch.autograd.grad(output.sum(), leaves)
    assert any(not grad.isfinite().all() for grad in grads)


def test_the_identity_start_learns_from_experts_whose_gates_are_closed(implementation):
    """Gates are the own angle's plus a scale times the rest, and the scale starts at zero."""
    query, key, value, gates = inputs()
    own = torch.tensor([1.0, 0.0, 0.0])
    picked = (gates != 0) | (own != 0)
    weight = torch.linspace(-1, 1, 2 * 9 * 4 * 6).reshape(2, 9, 4, 6)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        output, _ = mix(implementation, query, key, value, own + scale * (gates - own), picked=picked)
        return (output * weight).sum()

    scale = torch.zeros((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss(scale), scale)
    # The output is linear in the gates, so any step gives the derivative.
    torch.testing.assert_close(grad, loss(torch.ones(())) - loss(torch.zeros(())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("all_picked", [False, True])
def test_gradients_equal_the_reference(implementation, all_picked):
    """Those of gates only where the expert was picked: a gate that is zero and stays zero needs none."""

    def gradients(name: str) -> list[torch.Tensor]:
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        output, _ = mix(name, *tensors, query_start=0, picked=picked)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        return [tensor.grad for tensor in tensors]

    gates = inputs()[-1]
    picked = torch.ones_like(gates, dtype=torch.bool) if all_picked else gates != 0
    *actual, actual_gates = gradients(implementation)
    *expected, expected_gates = gradients("reference")
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual_gates * picked, expected_gates * picked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_rounding_of_the_reference(implementation, dtype):
    query, key, value, gates = inputs()
    expected, _ = mix("reference", query, key, value, gates, query_start=0)
    low = [tensor.to(dtype) for tensor in (query, key, value)]
    output, _ = mix(implementation, *low, gates, query_start=0)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_the_name_of_an_implementation_that_there_was_reads_as_auto():
    """Configs of earlier versions may hold it."""
    expected, _ = mix("auto", *inputs(), backend="sdpa")
    with pytest.warns(FutureWarning, match="no implementation 'grouped' any more.* read as 'auto'"):
        output, _ = mix("grouped", *inputs(), backend="sdpa")
    assert torch.equal(output, expected)


def test_a_mask_of_two_dimensions_is_for_eager_attention():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        mix("reference", *inputs(), query_start=0, attention_mask=torch.ones(2, 9))


@st.composite
def problems(draw) -> dict:
    """Shapes, masks and numbers of experts of all kinds."""
    num_experts = draw(st.integers(1, 5))
    queries = draw(st.one_of(st.integers(1, 40), st.integers(41, 150)))
    start = draw(st.one_of(st.integers(0, 20), st.integers(100, 150)))
    head_dim = draw(st.sampled_from([8, 20, 64]))
    size = draw(st.sampled_from([head_dim, head_dim // 2]))
    layout = RotaryLayout(draw(st.sampled_from([0, head_dim - size])), size, draw(st.booleans()))
    mask = draw(st.sampled_from([None, "padding", "window", "additive", "per head", "both directions", "none"]))
    return {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 3)),
        "groups": draw(st.sampled_from([1, 2, 3, 6])),
        "queries": queries,
        "start": start,
        # A static cache has more room than tokens, which needs a mask.
        "keys": start + queries + (0 if mask is None else draw(st.integers(0, 5))),
        "head_dim": head_dim,
        "value_dim": draw(st.sampled_from([head_dim, 6, 40])),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "layout": layout,
        "mask": mask,
        "most_decoded": draw(st.sampled_from([0, 8])),
        "seed": draw(st.integers(0, 100)),
    }


def make_mask(problem: dict) -> torch.Tensor | None:
    if problem["mask"] in (None, "none"):
        return None
    if problem["mask"] == "both directions":
        generator = torch.Generator().manual_seed(2)
        return torch.rand(problem["batch"], 1, problem["queries"], problem["keys"], generator=generator) < 0.5
    positions = problem["start"] + torch.arange(problem["queries"])[:, None]
    keys = torch.arange(problem["keys"])
    allowed = (keys <= positions).expand(problem["batch"], 1, -1, -1).clone()
    if problem["mask"] == "window":
        allowed &= keys > positions - 6
    if problem["mask"] == "padding":
        padding = min(3, problem["start"])
        allowed[0, ..., :padding] = False
    if problem["mask"] == "per head":
        heads = problem["kv_heads"] * problem["groups"]
        reach = 2 + torch.arange(heads)[:, None, None]
        allowed = allowed & (keys > positions - reach)
    if problem["mask"] == "additive":
        bias = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(1))
        return bias.masked_fill(~allowed, torch.finfo(torch.float32).min)
    return allowed


@pytest.mark.slow
@pytest.mark.parametrize("implementation", sorted(set(RUNNABLE) - {"reference", "delegated", "folded"}))
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_any_problem_equals_the_reference(implementation, problem):
    generator = torch.Generator().manual_seed(problem["seed"])
    heads = problem["kv_heads"] * problem["groups"]
    bases = tuple(10.0 * 3**index for index in range(problem["num_experts"]))
    logits = torch.randn(problem["batch"], heads, problem["queries"], len(bases), generator=generator)
    tensors = [
        torch.randn(problem["batch"], count, length, size, generator=generator).requires_grad_()
        for count, length, size in (
            (heads, problem["queries"], problem["head_dim"]),
            (problem["kv_heads"], problem["keys"], problem["head_dim"]),
            (problem["kv_heads"], problem["keys"], problem["value_dim"]),
        )
    ]
    gates = select_experts(logits, problem["top_k"]).requires_grad_()
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_MOST_DECODED", problem["most_decoded"])
        for name in (implementation, "reference"):
            output, _ = mixed_attention(
                *tensors,
                gates,
                rotations=table(problem["layout"], bases),
                query_start=problem["start"],
                attend=None,
                attention_mask=make_mask(problem),
                implementation=name,
                is_causal=problem["mask"] != "none",
            )
            weight = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
            grads = torch.autograd.grad((output * weight).sum(), [*tensors, gates])
            results.append((output, *grads[:3], grads[3] * (gates != 0)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_values_of_a_table_are_those_of_float64_whatever_it_has_grown_from():
    rotations, device = table(LAYOUTS["half"]), torch.device("cpu")
    short, long = rotations.cos_sin(10, device), rotations.cos_sin(5000, device)
    angles = torch.arange(5000, dtype=torch.float64)[:, None] * rotations.deltas[2]
    for part, grown, exact in zip(short, long, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(grown[2], exact.float(), rtol=0, atol=1e-7)
        assert torch.equal(part, grown[:, :10])
