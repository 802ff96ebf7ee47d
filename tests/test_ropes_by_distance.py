"""Experts whose rope changes with the distance of the key, against scores computed pair by pair in float64."""

import pytest
import torch
from representatives import slow_but

from peft_moice.attention import mixed_attention
from peft_moice.rope import RotaryLayout, RotationTable, rotate
from peft_moice.rope.rotation import NEVER, FarRopes

LAYOUTS = {
    "half": RotaryLayout(0, 16, False),
    "interleaved": RotaryLayout(0, 16, True),
    "partial": RotaryLayout(4, 8, False),
}
OWN, OTHER, SLOWER = 10.0, 40.0, 8.0
LENGTHS = [(700, 700), (150, 300), (40, 60), (1, 300), (3, 130), (1, 7)]


def frequencies(base: float, layout: RotaryLayout) -> torch.Tensor:
    return base ** (-torch.arange(0, layout.size, 2, dtype=torch.float64) / layout.size)


def table(layout: RotaryLayout, starts: tuple[int, ...], slower: float = SLOWER, factors=None) -> RotationTable:
    """Experts at the own angle that turn far keys `slower`; those that never do at another angle."""
    own = frequencies(OWN, layout)
    near = [own * 0 if start < NEVER else frequencies(OTHER, layout) - own for start in starts]
    far = FarRopes(torch.stack([own / slower - own] * len(starts)), starts, factors or (1.0,) * 2 * len(starts))
    return RotationTable(torch.stack(near), layout, far)


def turned(x: torch.Tensor, positions: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    angles = positions.double()[..., None] * frequencies(OWN, layout)
    return rotate(x.double(), angles.cos(), angles.sin(), layout).float()


def oracle(query, key, value, gates, m, n, layout, starts, factors=None, seen=None):
    """From unrotated vectors: the angle of every pair of a query at `m` and a key at `n`, then a plain softmax."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1)
    distance = (m[..., :, None] - n[..., None, :]).double()  # [B or 1, S, T]
    distance = distance[:, None]
    seen = distance >= 0 if seen is None else seen
    rotated = range(layout.start, layout.start + layout.size)
    rest = [d for d in range(query.shape[-1]) if d not in rotated]
    pairs = rotated[0::2], rotated[1::2]
    if not layout.interleaved:
        pairs = rotated[: layout.size // 2], rotated[layout.size // 2 :]
    mixed = 0.0
    for j, start in enumerate(starts):
        factor = (
            torch.ones(()) if factors is None else torch.where(distance >= start, factors[len(starts) + j], factors[j])
        )
        scores = 0.0
        for i, (a, b) in enumerate(zip(*pairs, strict=True)):
            theta = frequencies(OWN, layout)[i]
            near = theta if start < NEVER else frequencies(OTHER, layout)[i]
            angle = torch.where(distance < start, near * distance, near * start + theta / SLOWER * (distance - start))
            qa, qb, ka, kb = query[..., a], query[..., b], key[..., a], key[..., b]
            same = qa[..., :, None] * ka[..., None, :] + qb[..., :, None] * kb[..., None, :]
            cross = qa[..., :, None] * kb[..., None, :] - qb[..., :, None] * ka[..., None, :]
            scores = scores + same * angle.cos() + cross * angle.sin()
        scores = scores * factor + query[..., rest] @ key[..., rest].mT
        scores = (scores * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        mixed = mixed + gates[..., j, None] * (scores.softmax(dim=-1) @ value.double())
    return mixed.transpose(1, 2)


def attend(query, key, value, mask, scaling=None, **options):
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[-2] - query.shape[-2])
    probs = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probs = probs.softmax(dim=-1)
    return (probs @ value.repeat_interleave(groups, 1)).transpose(1, 2), probs


def problem(queries, keys, starts, layout, value_size=6, positions=None, seen=None, factors=None):
    """The tensors and options of a call whose queries stand at the last keys, and what it has to give."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, queries, 20), (2, keys, 20), (2, keys, value_size), (4, queries, len(starts))
    query, key, value, logits = (torch.randn(2, *size, generator=generator) for size in sizes)
    n = torch.arange(keys)[None] if positions is None else positions
    m, gates = n[:, keys - queries :], logits.softmax(dim=-1)
    expected = oracle(query, key, value, gates, m, n, layout, starts, factors=factors, seen=seen)
    vectors = turned(query, m[:, None], layout), turned(key, n[:, None], layout), value, gates
    rotations = table(layout, starts, factors=factors)
    return vectors, {"rotations": rotations, "query_start": keys - queries, "attend": attend}, expected


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=atol)


@pytest.fixture(params=["reference", "delegated", "native"])
def implementation(request) -> str:
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("factors", [None, (1.0, 1.2, 0.7, 1.0)], ids=["plain", "factors"])
@pytest.mark.parametrize(("queries", "keys"), slow_but(LENGTHS[1:], LENGTHS))
def test_equals_pairwise_scores(implementation, layout, factors, queries, keys):
    vectors, options, expected = problem(queries, keys, (37, NEVER), layout, factors=factors)
    output, probs = mixed_attention(*vectors, implementation=implementation, **options)
    close(output, expected)
    if probs is not None:
        groups = probs.float() @ vectors[2].repeat_interleave(2, 1)
        torch.testing.assert_close(groups.transpose(1, 2), output, rtol=1e-5, atol=1e-5)


def test_a_start_at_zero_is_the_far_rope_alone_and_one_beyond_all_keys_the_near_one(implementation):
    layout = LAYOUTS["half"]
    for start, slower in ((0, SLOWER), (41, 1.0)):
        vectors, options, _ = problem(40, 40, (start,), layout)
        own = frequencies(OWN, layout)
        plain = options | {"rotations": RotationTable((own / slower - own)[None], layout)}
        outputs = [mixed_attention(*vectors, implementation=implementation, **way)[0] for way in (plain, options)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_hide_far_keys_as_well_as_near_ones(implementation, additive):
    seen = torch.ones(2, 1, 90, 90, dtype=torch.bool).tril()
    seen[1, :, :, :25] = False
    seen[1, :, torch.arange(25), torch.arange(25)] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
    vectors, options, expected = problem(90, 90, (20,), LAYOUTS["half"], seen=seen)
    close(mixed_attention(*vectors, implementation=implementation, attention_mask=mask, **options)[0], expected)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize(("queries", "keys"), slow_but(LENGTHS[1:], LENGTHS))
def test_parts_joined_by_their_log_sum_exps_equal_pairwise_scores(queries, keys, mask):
    n = torch.arange(keys)[None]
    m = n[:, keys - queries :]
    seen = (m[..., None] >= n[:, None])[None].repeat(2, 1, 1, 1)
    if mask is not None:
        seen[1] &= (n >= 3) | (m[..., None] == n)
    way = {"attention_mask": None if mask is None else seen, "implementation": "delegated", "backend": "sdpa"}
    way |= {"attend": lambda *_, **__: pytest.fail("not by parts")}
    if mask == "additive":
        way["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    # PyTorch's operators take values of the size of keys; single queries do without an operator.
    for value_size in (20, 6) if queries == 1 else (20,):
        given = {"value_size": value_size, "seen": seen, "factors": (1.2, 0.7)}
        vectors, options, expected = problem(queries, keys, (37,), LAYOUTS["partial"], **given)
        for dtype, atol in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)):
            close(mixed_attention(*(x.to(dtype) for x in vectors), **options | way)[0], expected, atol)


@pytest.mark.parametrize("implementation", ["reference", "delegated"])
def test_any_positions(implementation):
    positions = torch.stack((torch.arange(30), torch.arange(30) * 3 - 4)).clamp(min=0)
    seen = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    vectors, options, expected = problem(30, 30, (9,), LAYOUTS["interleaved"], positions=positions, seen=seen)
    options |= {"query_positions": positions, "key_positions": positions, "attention_mask": seen}
    close(mixed_attention(*vectors, implementation=implementation, **options)[0], expected)


def test_gradients_equal_those_of_the_reference():
    vectors, options, _ = problem(60, 60, (15, NEVER), LAYOUTS["half"])
    grads = []
    for implementation in ("reference", "delegated", "auto"):
        own = [x.clone().requires_grad_() for x in vectors]
        output, _ = mixed_attention(*own, implementation=implementation, backend="sdpa", **options)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        grads.append([x.grad for x in own])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-5)
