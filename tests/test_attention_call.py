"""A call of the operator is checked once, and tells which implementations can compute it."""

import re

import pytest
import torch
from test_operator import LAYOUTS, attend, table
from torch.testing import assert_close

from peft_moice.attention import mixed_attention
from peft_moice.attention.call import AttentionCall
from peft_moice.routing.router import select_experts

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, HEAD_DIM = 2, 4, 2, 5, 9, 8


def tensors(queries: int = QUERIES, keys: int = KEYS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(BATCH, HEADS, queries, HEAD_DIM, generator=generator),
        "key": torch.randn(BATCH, KV_HEADS, keys, HEAD_DIM, generator=generator),
        "value": torch.randn(BATCH, KV_HEADS, keys, 6, generator=generator),
        "gates": select_experts(torch.randn(BATCH, HEADS, queries, 3, generator=generator), 2),
    }


def at(queries: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"query_positions": torch.zeros(queries), "key_positions": torch.zeros(keys)}


def call(**changes) -> AttentionCall:
    return AttentionCall(
        **{**tensors(), "rotations": table(LAYOUTS["half"]), "query_start": KEYS - QUERIES, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": torch.ones(BATCH, HEADS, QUERIES, 2)}, r"gates have shape \(2, 4, 5, 2\).* need \(2, 4, 5, 3\)"),
        ({"picked": torch.ones(BATCH, HEADS, 1, 3, dtype=torch.bool)}, r"picks \(2, 4, 1, 3\)"),
        ({"value": torch.zeros(BATCH, KV_HEADS, KEYS - 1, 6)}, r"values of shape \(2, 2, 8, 6\) do not belong"),
        ({"key": torch.zeros(1, KV_HEADS, KEYS, 8), "value": torch.zeros(1, KV_HEADS, KEYS, 6)}, "do not belong"),
        ({"key": torch.zeros(BATCH, KV_HEADS, KEYS, 4)}, "do not belong"),
        ({"key": torch.zeros(BATCH, 3, KEYS, 8), "value": torch.zeros(BATCH, 3, KEYS, 6)}, "do not belong"),
        ({"query_start": KEYS - QUERIES + 1}, "5 queries starting at position 5 do not fit 9 keys"),
        ({"query_start": -1}, "5 queries starting at position -1 do not fit 9 keys"),
        ({"query_positions": torch.zeros(1, QUERIES)}, "have to be given together"),
        ({"key_positions": torch.zeros(1, KEYS)}, "have to be given together"),
        (at((1, QUERIES), (3, KEYS)), r"`key_positions` have shape \(3, 9\), but need \(2 or 1, 9\)"),
        (at((1, KEYS), (1, KEYS)), r"`query_positions` have shape \(1, 9\), but need \(2 or 1, 5\)"),
        (at((QUERIES,), (KEYS,)), "`query_positions` have shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


MASK = torch.zeros(BATCH, 1, QUERIES, KEYS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": {"dropout": 0.1}}, "dropout"),
        ({"options": {"softcap": 30.0}}, "softcap"),
        ({"options": {"s_aux": torch.zeros(HEADS)}}, "attention sinks"),
        ({"options": {"position_bias": MASK}}, "position bias"),
        ({"options": {"output_attentions": True}}, "does not give attention probabilities"),
        ({"options": {"sliding_window": KEYS - 1}}, "sliding window from the mask"),
        ({"query_start": torch.zeros(QUERIES, dtype=torch.int64)}, "packed sequences"),
        (at((1, QUERIES), (1, KEYS)), "stand elsewhere"),
        ({"attention_mask": torch.ones(BATCH, KEYS)}, "four dimensions"),
        ({"attention_mask": "block mask"}, "four dimensions"),
        ({"attention_mask": MASK.long()}, "boolean and additive masks, not torch.int64"),
        ({"attention_mask": MASK[..., :-1]}, r"\(2, 1, 5, 8\), which does not broadcast to \(2, 4, 5, 9\)"),
        ({"attention_mask": MASK[:, :, :2]}, "does not broadcast"),
        ({"attention_mask": MASK.clone().requires_grad_()}, "no gradient for the mask"),
    ],
)
def test_what_only_the_models_own_attention_can_do(changes, reason):
    assert re.search(reason, call(**changes).why_not_plain() or "")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_start": 0},
        {"options": {"dropout": 0.0, "softcap": None, "s_aux": None, "output_attentions": False}},
        {"options": {"sliding_window": KEYS}},
        {"options": {"sliding_window": 2}, "attention_mask": MASK},
        {"query_start": torch.tensor(KEYS - QUERIES)},
        {"attention_mask": MASK},
        {"attention_mask": MASK.bool()},
        {"attention_mask": MASK[:1, :, :1, :1]},
        {"attention_mask": MASK.to(torch.bfloat16)},
    ],
)
def test_what_is_plain_attention(changes):
    assert call(**changes).why_not_plain() is None


def test_an_implementation_that_is_forced_and_cannot_run_says_why():
    arguments = {**tensors(), "rotations": table(LAYOUTS["half"]), "attend": attend}
    with pytest.raises(ValueError, match=r"The native implementation cannot be used: .*dropout.*'auto'"):
        mixed_attention(**arguments, implementation="native", dropout=0.5)
    with pytest.raises(ValueError, match=r"The delegated implementation cannot be used: it needs .*`attend`"):
        mixed_attention(**{**arguments, "attend": None}, implementation="delegated")
    with pytest.raises(ValueError, match="Unknown implementation 'fast'; choose 'auto' or one of"):
        mixed_attention(**arguments, implementation="fast")


def test_defaults():
    plain = call()
    assert plain.scaling == HEAD_DIM**-0.5 and plain.is_causal
    assert call(options={"scaling": 0.5}).scaling == 0.5
    assert not call(options={"is_causal": False}).is_causal
    assert not call(attention_mask=MASK).is_causal
    assert torch.equal(plain.picks(), plain.gates != 0)
    picked = torch.ones_like(plain.gates, dtype=torch.bool)
    assert call(picked=picked).picks() is picked


@pytest.mark.parametrize("name", ["reference", "delegated", "folded"])
def test_coordinates_that_say_what_the_order_says_change_nothing(name):
    arguments = {**tensors(), "rotations": table(LAYOUTS["interleaved"]), "attend": attend, "implementation": name}
    start = KEYS - QUERIES
    ordered, _ = mixed_attention(**arguments, query_start=start)
    positions = torch.arange(KEYS)[None]
    # Only differences matter, so every row may have an origin of its own.
    shifted = positions + torch.tensor([[7], [-3]])
    for keys in (positions, shifted):
        explicit, _ = mixed_attention(
            **arguments, query_start=start, query_positions=keys[:, start:], key_positions=keys
        )
        assert_close(explicit, ordered, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["reference", "delegated", "folded"])
def test_tokens_with_gaps_are_those_of_a_longer_sequence(name):
    """Keys at every third position attend as they do in a sequence whose other keys are hidden."""
    stride, length = 3, 6
    long = tensors(queries=stride * length, keys=stride * length)
    options = {"rotations": table(LAYOUTS["half"]), "attend": attend, "implementation": name}
    visible = torch.ones(stride * length, stride * length, dtype=torch.bool).tril()
    visible[:, torch.arange(stride * length) % stride != 0] = False
    expected, _ = mixed_attention(**long, **options, attention_mask=visible[None, None])
    short = {key: value[:, :, ::stride].contiguous() for key, value in long.items()}
    positions = stride * torch.arange(length)[None]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    actual, _ = mixed_attention(
        **short, **options, attention_mask=mask, query_positions=positions, key_positions=positions
    )
    assert_close(actual, expected[:, ::stride], rtol=0, atol=2e-5)


@pytest.mark.parametrize("heads_of_mask", [1, HEADS])
def test_folded_heads_are_calls_one_by_one(heads_of_mask):
    """Outputs, probabilities and gradients, where every head has a mask of its own, too."""
    reach = 2 + torch.arange(heads_of_mask)[:, None, None]
    order = torch.arange(KEYS)
    queries = order[KEYS - QUERIES :, None]
    mask = ((order <= queries) & (order > queries - reach)).expand(BATCH, -1, -1, -1)
    options = {"rotations": table(LAYOUTS["half"]), "query_start": KEYS - QUERIES, "attend": attend}
    results = []
    for name in ("folded", "delegated"):
        arguments = {key: value.clone().requires_grad_() for key, value in tensors().items()}
        output, probs = mixed_attention(**arguments, **options, attention_mask=mask, implementation=name)
        (output.square().sum() + probs.square().sum()).backward()
        results.append([output, probs, *(tensor.grad for tensor in arguments.values())])
    assert_close(*results, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["delegated", "folded"])
def test_the_models_own_attention_gets_its_options(name):
    seen = []

    def recording(*args, **options):
        seen.append(options)
        return attend(*args)

    arguments = {**tensors(), "rotations": table(LAYOUTS["half"]), "query_start": KEYS - QUERIES}
    mixed_attention(**arguments, attend=recording, implementation=name, dropout=0.0, sliding_window=7)
    assert seen == [{"dropout": 0.0, "sliding_window": 7}] * (1 if name == "folded" else 3)
