"""What the routers decide for a text, and the names that the package gives without importing them at once."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny_models import WIDE, adapted_model, load, two_adapters, wide_config
from transformers import AutoTokenizer

import peft_moice
from peft_moice.evaluation import gates_along

TEXT = "w3 w9 w4 w20 w7"


@pytest.fixture
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


def test_gates_by_token_layer_and_head(adapted, tokenizer):
    explanation = peft_moice.explain(adapted, tokenizer, TEXT)
    assert explanation.tokens == TEXT.split()
    assert explanation.gates.shape == (5, 3, 4, 4)
    torch.testing.assert_close(explanation.gates.sum(dim=-1), torch.ones(5, 3, 4))
    assert (explanation.gates > 0).sum(dim=-1).unique().tolist() == [2]
    assert explanation.rope_bases == [tuple(10000.0 * multiple for multiple in WIDE)] * 3
    assert explanation.layers == [f"model.layers.{index}.self_attn" for index in range(3)]
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    for layer, gates in enumerate(gates_along(adapted, ids).values()):
        assert torch.equal(explanation.gates[:, layer], gates.permute(1, 0, 2))
    merged = torch.stack(list(gates_along(adapted.merge_and_unload(), ids, "0").values()))
    torch.testing.assert_close(merged.permute(2, 0, 1, 3), explanation.gates, rtol=0, atol=1e-6)


def test_a_merged_model_explains_itself_as_its_adapter_does(llama, tokenizer):
    model = adapted_model(llama)
    before = peft_moice.explain(model, tokenizer, TEXT)
    after = peft_moice.explain(model.merge_and_unload(), tokenizer, TEXT)
    torch.testing.assert_close(after.gates, before.gates, rtol=0, atol=1e-6)
    assert (after.layers, after.rope_bases, after.tokens) == (before.layers, before.rope_bases, before.tokens)


def test_several_adapters_are_one_mixture(llama, tokenizer):
    model = two_adapters(llama, base_multipliers=[1.0, 3.0], top_k=1)
    single = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        single[name] = peft_moice.explain(model, tokenizer, TEXT)
    model.base_model.set_adapter(["one", "two"])
    both = peft_moice.explain(model, tokenizer, TEXT)
    assert both.rope_bases[0] == (2500.0, 5000.0, 10000.0, 30000.0, 40000.0)
    # The first layer sees the same queries whichever adapters are active.
    one, two, mixed = (explanation.gates[:, 0] for explanation in (single["one"], single["two"], both))
    torch.testing.assert_close(mixed[..., 2], (one[..., 0] + two[..., 0]) / 2)
    torch.testing.assert_close(mixed[..., 3], two[..., 1] / 2)
    torch.testing.assert_close(mixed[..., 4], one[..., 3] / 2)


def test_what_cannot_be_explained(llama, adapted, tokenizer):
    with pytest.raises(ValueError, match="No routers are at work"):
        peft_moice.explain(load(llama), tokenizer, TEXT)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="No routers are at work"):
        peft_moice.explain(adapted, tokenizer, TEXT)
    with pytest.raises(ValueError, match="no tokens"):
        peft_moice.explain(adapted, tokenizer, "")
    with pytest.raises(TypeError, match="one string"):
        peft_moice.explain(adapted, tokenizer, [TEXT])
    with pytest.raises(ValueError, match=r"shape \(1, 12\); give one sequence"):
        gates_along(adapted, torch.arange(12)[None])
    with pytest.raises(ValueError, match=r"routers of the name 'other' at work; those at work are \['default'\]"):
        gates_along(adapted, torch.arange(12), "other")
    uneven = get_peft_model(load(llama), wide_config(layers_to_transform=[0]), adapter_name="a")
    uneven.add_adapter("b", wide_config(base_multipliers=[1.0, 3.0], layers_to_transform=[1]))
    uneven.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"\[2, 4\] base angles"):
        peft_moice.explain(uneven, tokenizer, TEXT)


def test_its_picture(adapted, tokenizer):
    pytest.importorskip("matplotlib")
    explanation = peft_moice.explain(adapted, tokenizer, TEXT)
    axis = explanation.plot(layer=1, head=2).axes[0]
    assert axis.get_title() == "model.layers.1.self_attn, head 2"
    assert [label.get_text() for label in axis.get_xticklabels()] == TEXT.split()
    # The lowest band of the stack is the model's own angle.
    own = axis.collections[0].get_paths()[0].vertices
    assert own[:, 1].max() == pytest.approx(explanation.gates[:, 1, 2, 0].max().item(), abs=1e-6)
    assert explanation.plot().axes[0].get_title() == "mean over layers, mean over heads"
    with pytest.raises(IndexError):
        explanation.plot(layer=3)


@pytest.mark.slow
def test_every_name_is_there_and_the_dear_ones_come_late():
    assert set(peft_moice.__all__) <= set(dir(peft_moice))
    for name in peft_moice.__all__:
        assert getattr(peft_moice, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        peft_moice.nonsense  # noqa: B018
    code = (
        "import sys, peft_moice; late = {'matplotlib', 'peft_moice.evaluation', 'peft_moice.evaluation.plotting', "
        "'peft_moice.training.callback', 'peft_moice.evaluation.angles'}; "
        "assert not late & set(sys.modules), late & set(sys.modules); "
        "from peft_moice import MoICECallback, angles, evaluation, plotting; assert late - {'matplotlib'} <= "
        "set(sys.modules); assert 'matplotlib' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1000:]
