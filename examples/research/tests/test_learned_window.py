"""The rules of learned_window.py are those of the package, and each of their kinds learns."""

import learned_window
import pytest
import torch
from tiny_models import load, save_tiny_model, token_ids
from torch.nn.functional import cross_entropy
from window import METHODS, OURS, under

WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def read(folder):
    """The ids of a text of 24 tokens and 10 more, the cache of the former, and the losses of the last 6 behind it."""
    model, ids = under(load(folder).eval(), WINDOW, METHODS[OURS]), token_ids(length=34)[:1]
    with torch.no_grad():
        cache = model(ids[:, :24]).past_key_values
        prefix = [(layer.keys, layer.values) for layer in cache.layers]
        logits = model(ids[:, 24:], past_key_values=cache).logits[0]
    return ids[0, 24:].tolist(), prefix, cross_entropy(logits[3:-1], ids[0, 28:], reduction="none")


@pytest.mark.parametrize("kind", learned_window.KINDS)
def test_rules_start_as_the_extension_and_learn(folder, read, kind):
    ids, prefix, expected = read
    rules, model = learned_window.under_rules(kind, load(folder).eval(), WINDOW)
    # Beside another part, which it does not see.
    first, second = rules.losses(model, prefix, [(24, ids, 6), (20, ids[:4], 2)])
    if kind not in ("ln m / ln window", "routers over near 0.75, 0.5, 0.25"):
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    (first.sum() + second.sum()).backward() if first.requires_grad else None
    trained = [p for p in (*rules.parameters(), *model.parameters()) if p.requires_grad]
    assert bool(trained) == (kind not in ("untrained", "ln m / ln window"))
    assert all(p.grad is not None for p in trained) and (not trained or any(p.grad.abs().max() > 0 for p in trained))
