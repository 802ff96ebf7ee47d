"""Tables of rotations: shared by layers, kept while an adapter uses them, and bounded for combinations of adapters."""

import copy
import itertools

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.rope import LayerRope

pytestmark = pytest.mark.usefixtures("no_grad")


def config(*multiples: float, **options) -> MoICEConfig:
    return MoICEConfig(base_multipliers=list(multiples), top_k=2, init_weights=False, **options)


def rope_of(model) -> LayerRope:
    ropes = {id(module.rope): module.rope for module in model.modules() if isinstance(module, MoICELayer)}
    assert len(ropes) == 1
    return next(iter(ropes.values()))


def sets_kept(model) -> list[tuple[float, ...]]:
    return sorted(rope_bases for rope_bases, _ in rope_of(model)._tables)


def test_tables_go_with_the_last_adapter_that_uses_them():
    model = get_peft_model(tiny_model("llama"), config(1.0, 4.0)).eval()
    kept = sets_kept(model)
    model(tokens())
    for step in range(5):
        model.add_adapter("other", config(1.0, 5.0 + step))
        model.add_adapter("same", config(1.0, 5.0 + step))
        model.set_adapter("other")
        model(tokens())
        model.set_adapter("default")
        model.delete_adapter("other")
        assert len(sets_kept(model)) == 2
        model.delete_adapter("same")
        assert sets_kept(model) == kept


def test_an_adapter_that_is_replaced_leaves_no_tables():
    model = get_peft_model(tiny_model("llama"), config(1.0, 4.0)).eval()
    other = copy.deepcopy(model.peft_config["default"])
    other.rope_bases = [10000.0, 80000.0]
    for layer in (module for module in model.modules() if isinstance(module, MoICELayer)):
        layer.update_layer("default", other)
    model(tokens())
    assert sets_kept(model) == [(10000.0, 80000.0)]


@pytest.mark.slow
def test_combinations_share_tables_whatever_their_order_and_are_few():
    model, names = get_peft_model(tiny_model("llama"), config(1.0, 4.0), "a").eval(), "abcde"
    for name in names[1:]:
        model.add_adapter(name, config(1.0, 3.0 + ord(name)))
    own, outputs = sets_kept(model), []
    for order in itertools.islice(itertools.permutations(names), 0, 120, 17):
        model.base_model.set_adapter(list(order))
        outputs.append(model(tokens()).logits)
        assert len(sets_kept(model)) == len(own) + 1
    for logits in outputs[1:]:
        torch.testing.assert_close(logits, outputs[0], rtol=0, atol=1e-5)
    for size in (2, 3, 4):
        for some in itertools.combinations(names, size):
            model.base_model.set_adapter(list(some))
            model(tokens())
    assert len(sets_kept(model)) == len(own) + 4
    model.base_model.set_adapter("a")
    model.delete_adapter("e")
    assert len(sets_kept(model)) == len(own) - 1


def test_merging_and_copies_keep_what_they_use():
    model = get_peft_model(tiny_model("llama"), config(1.0, 4.0)).eval()
    expected = model(tokens()).logits
    twin = copy.deepcopy(model)
    twin.add_adapter("other", config(1.0, 9.0))
    assert len(sets_kept(model)) == 1 and len(sets_kept(twin)) == 2
    model.merge_adapter()
    model.unmerge_adapter()
    assert len(sets_kept(model)) == 1
    assert torch.equal(model(tokens()).logits, expected)
    merged = model.merge_and_unload()
    assert torch.equal(merged(tokens()).logits, expected)
