"""The scripts behind docs/experiments.md and README.md of this folder compute what they say."""

import argparse
import gzip
import json
import math
import random
import sys
from pathlib import Path

import beyond
import compare
import depth
import forms
import frozen
import measure
import objectives
import pytest
import short_context
import torch
import trained
from byte_models import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from exams import Exam
from matplotlib.colors import to_hex
from methods import METHODS, ms_poe, routers, score_mean, static
from models import number_of_parameters, without_adapter
from peft import LoraConfig, get_peft_model
from pictures import plot_choices, plot_tradeoff
from tiny_models import load, logits_of, save_tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_moice import MoICELayer
from peft_moice.evaluation import Result, evaluate, gates_along, perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.__name__)
def test_answers_stand_in_their_prompts(form):
    text = forms.docstrings()
    for seed in range(20):
        shown, pairs = form(random.Random(seed), text)
        assert len({question for question, _ in pairs}) == len(pairs) >= 4
        assert all(answer in shown for _, answer in pairs)
        assert not shown.startswith("{") and "access code" not in shown


def test_joined_prompts_are_asked_about_all_of_them():
    text, asked = forms.docstrings(), set()
    for seed in range(8):
        rng = random.Random(seed)
        parts = [rng.choice(forms.FORMS)(rng, text) for _ in range(3)]
        messages = forms.draw(random.Random(seed), text, questions=4, joined=3)
        assert messages[0]["content"].startswith("\n\n".join(shown for shown, _ in parts) + "\n\n")
        for message in messages[::2]:
            asked |= {i for i, (_, pairs) in enumerate(parts) if any(message["content"].endswith(q) for q, _ in pairs)}
    assert asked == {0, 1, 2}


def test_the_rate_rises_over_the_warm_up_and_falls_after_it():
    rates = [compare.schedule(step / 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.0, 0.5, 1.0] and rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert compare.schedule(0.0, 0.0) == 1.0 and compare.schedule(1.0, 0.2) == pytest.approx(0.0)


def test_runs_are_made_once_and_go_on_after_a_stop(tmp_path, monkeypatch, capsys):
    folder, out = save_tiny_model(tmp_path / "tiny", vocab_size=256, num_hidden_layers=1), tmp_path / "runs.jsonl"
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    with gzip.open(tmp_path / "leval-coursera.jsonl.gz", "wt") as file:
        file.write(json.dumps({"input": "abcdefgh" * 640}))
    words = f"--model {folder} --data {tmp_path} --out {out} --steps 1 --keep_weight 0 --tasks perplexity --rate 1e-2"
    monkeypatch.setattr(compare, "docstrings", lambda: forms.docstrings()[:100_000])
    monkeypatch.setattr(sys, "argv", ["compare.py", *words.split(), "--method", "base", "routers", "--seed", "0", "1"])

    def run(*more: str) -> list[dict]:
        compare.main(compare.parser().parse_args([*sys.argv[1:], *more]))
        return compare.read(out)

    runs = run()
    expected = [("base", 0.0, 0), ("routers", 1e-2, 0), ("routers", 1e-2, 1)]
    assert [(record["method"], record["rate"], record["seed"]) for record in runs] == expected
    assert runs[1]["losses"] != runs[2]["losses"] and runs[1]["perplexity"] != runs[0]["perplexity"]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| r")]
    assert row.startswith("| routers: five angles, 1 steps, KL weight 0 | 0.01 | 2 |")
    last = runs.pop()
    out.write_text("".join(json.dumps(record) + "\n" for record in runs))
    assert run() == [*runs, {**last, "seconds": compare.read(out)[-1]["seconds"]}]
    assert [record["steps"] for record in run("--steps", "2", "--seed", "1")] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--method base", "need --data"),
        ("--method base lora --tasks json --save f", "these are 2"),
        ("--method lora --tasks json", "Give its learning rate"),
    ],
)
def test_runs_that_would_measure_nothing_are_refused(folder, tmp_path, words, reason):
    words = f"--model {folder} --out {tmp_path / 'runs.jsonl'} {words}"
    with pytest.raises(ValueError, match=reason):
        compare.main(compare.parser().parse_args(words.split()))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


UNTRAINED = ("base", "equal", "ms_poe", "positional_interpolation", "attention_buckets", "single", "yarn")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_is_trained_starts_as_the_base_model_and_can_be_switched_off(folder, name):
    base = logits_of(load(folder))
    make, options = METHODS[name]
    model = make(load(folder), options).eval()
    if not number_of_parameters(model):
        assert name.startswith(UNTRAINED)
        return
    if not options.get("from_equal"):
        torch.testing.assert_close(logits_of(model), base, rtol=1e-4, atol=1e-5)
    fill(model)
    assert (logits_of(model) - base).abs().max() > 1e-3
    with without_adapter(model):
        torch.testing.assert_close(logits_of(model), base, rtol=1e-4, atol=1e-5)
    assert (logits_of(model) - base).abs().max() > 1e-3


def test_a_temperature_scales_the_query(folder, monkeypatch):
    """All gates on an expert of temperature t: the model with queries t times as long."""
    monkeypatch.setitem(routers.EXPERTS, "hot", [(1.0, 1.0), (1.0, 1.7)])
    model = static.make(load(folder), {"experts": "hot"}).eval()
    for name, parameter in model.named_parameters():
        if "head_logits" in name:
            parameter.data[:, 1] = 50.0
        elif "identity_scale" in name:
            parameter.data.fill_(1.0)
    expected = load(folder)
    for layer in expected.model.layers:
        layer.self_attn.q_proj.weight.data *= 1.7
    ids = token_ids(length=20)
    torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids), rtol=1e-3, atol=1e-4)


def test_static_gates_are_the_same_for_every_token(folder):
    model = fill(static.make(load(folder), {}))
    layer = next(module for module in model.modules() if isinstance(module, MoICELayer))
    router = layer.moice_router["default"]
    gates = router.gates(router(torch.randn(2, 4, 7, 16)), 5)
    assert torch.equal(gates, gates[:1, :, :1].expand_as(gates))
    assert not torch.equal(gates[0, 0, 0], gates[0, 1, 0])


def test_frozen_gates_are_the_means_of_the_trained_ones(folder):
    model = fill(routers.make(load(folder), {})).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ loop.index + 4 }} w{{ m.content | length % 50 + 9 }} {% endfor %}"
    )
    before = gates_along(model, token_ids()[0])
    frozen.freeze(model, tokenizer)
    after = gates_along(model, token_ids()[0])
    for name, gates in after.items():
        assert torch.equal(gates, gates[:, :1].expand_as(gates))
        assert not torch.equal(before[name], before[name][:, :1].expand_as(gates))
        torch.testing.assert_close(gates.sum(-1), torch.ones_like(gates[..., 0]))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    return parser.parse_args(words)


class TestTrained:
    def test_loads_what_was_trained(self, folder, tmp_path):
        base = logits_of(load(folder))
        torch.testing.assert_close(logits_of(trained.load(arguments("--model", folder))[0]), base)
        adapted = fill(get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"])))
        adapted.save_pretrained(tmp_path / "lora")
        args = arguments("--model", folder, "--adapter", str(tmp_path / "lora"))
        torch.testing.assert_close(logits_of(trained.load(args)[0]), logits_of(adapted))
        assert trained.named(args) == f"{Path(folder).name} with lora"
        make, options = METHODS["routers"]
        routers = fill(make(load(folder), options))
        torch.save({n: p.detach() for n, p in routers.named_parameters() if p.requires_grad}, tmp_path / "saved")
        args = arguments("--model", folder, "--method", "routers", "--load", str(tmp_path / "saved"))
        torch.testing.assert_close(logits_of(trained.load(args)[0]), logits_of(routers))

    @pytest.mark.parametrize("words", [("--method", "routers"), ("--load", "f"), ("--adapter", "a", "--load", "f")])
    def test_refuses_half_of_what_it_needs(self, folder, words):
        with pytest.raises(ValueError, match="--method with --load, or --adapter alone"):
            trained.load(arguments("--model", folder, *words))


def write_exam(file: Path) -> Path:
    questions = [f"Q{i}\nA. x\nB. y\nC. z" for i in range(4)]
    records = [{"input": "abc " * 60, "instructions": questions, "outputs": list("ABCA")}]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_exams_take_questions_of_one_right_answer(tmp_path):
    record = {
        "input": "abc " * 100,
        "instructions": ["Q1\nA. x\nB. y", "Q2\nA. x\nB. y", "It rains, True or False?"],
        "outputs": ["B", "AB", "False [fact: True]"],
    }
    (tmp_path / "coursera.jsonl").write_text(json.dumps(record))
    task = Exam(tmp_path / "coursera.jsonl", byte_tokenizer())
    examples = task.draw(random.Random(0), 80, (0.0, 1.0))
    assert [(e.answers, e.choices) for e in examples] == [(("B",), ("A", "B")), (("False",), ("True", "False"))]
    assert examples[0].prompt.startswith("abc " * 20)
    assert "abc " * 21 not in examples[0].prompt
    model = tiny_llama()
    result = evaluate(model, byte_tokenizer(CHAT_TEMPLATE), task, lengths=[40], num_groups=1)
    assert result.positions == [] and len(result.scores) == 2


def test_questions_are_read_without_their_document(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    exam = Exam(write_exam(tmp_path / "exam.jsonl"), tokenizer)
    loss, tokens = short_context.question_loss(model, tokenizer, exam, 9, 0)
    texts = [f"Q{i}\nA. x\nB. y\nC. z\nThe answer is {answer}" for i, answer in enumerate("ABCA")]
    losses = [math.log(perplexity(model, tokenizer, text, chunk_length=len(text))) for text in texts]
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-5) and tokens == 4 * (len(texts[0]) - 1)
    assert short_context.question_loss(model, tokenizer, exam, 2, 0)[1] == tokens / 2


def test_depth_is_written_after_every_length(folder, tmp_path):
    out = tmp_path / "depth"
    args = arguments("--model", folder)
    vars(args).update(kind="keys", lengths=[60, 90], positions=[0.0, 1.0], questions=2, seed=0, name="tiny", out=out)
    depth.main(args)
    result = Result.load(out.with_suffix(".json"))
    assert result.lengths == [60, 90] and result.positions == [0.0, 1.0] and len(result.scores) == 8
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_losses_beyond_a_length_are_those_of_the_tokens_there(folder, tmp_path, monkeypatch):
    with gzip.open(tmp_path / "leval-sci_fi.jsonl.gz", "wt") as file:
        for text in (
            "short",
            "w2 w3 w4 w5 w6 w7 " * 12,
            "w2 w3 w4 w5 w6 w7 " * 12,
            "w9 w8 w7 w6 w5 w4 " * 12,
            "w2 " * 90,
        ):
            file.write(json.dumps({"input": text}) + "\n")
    args = arguments("--model", folder, "--float32")
    vars(args).update(data=tmp_path, edges=[20, 40, 60], documents=2, out=tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["beyond.py"])
    beyond.main(args)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    model, tokenizer = trained.load(args)
    found = {name: 0.0 for name in ("0 to 20", "20 to 40", "40 to 60")}
    for text in ("w2 w3 w4 w5 w6 w7 " * 12, "w9 w8 w7 w6 w5 w4 " * 12):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[:60]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        for name, part in zip(found, losses.split([19, 20, 20]), strict=True):
            found[name] += part.mean().item() / 2
    assert record["losses"] == pytest.approx(found, rel=1e-5) and record["documents"] == 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("single_2", {"rope_theta": 20000.0}),
        ("positional_interpolation", {"rope_type": "linear", "factor": 2.0}),
        ("yarn_2", {"rope_type": "yarn", "factor": 2.0}),
    ],
)
def test_one_rope_for_all_heads_is_that_of_a_model_with_this_config(folder, name, changes):
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == 10000.0
    config.rope_parameters |= changes
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config)
    make, options = METHODS[name]
    ids = token_ids(length=40)
    torch.testing.assert_close(logits_of(make(load(folder), options), ids), logits_of(expected, ids))


@pytest.mark.parametrize("name", ["geometry_per_head", "attention_buckets", "ms_poe"])
def test_reading_on_from_a_cache_gives_what_reading_whole_gives(folder, name):
    make, options = METHODS[name]
    model = make(load(folder), options).eval()
    if name == "geometry_per_head":
        fill(model)
    ids = token_ids(length=40)[0].tolist()
    other = [*ids[:20], *reversed(ids[20:])]
    reader = measure.Reader(model)
    read = [reader.logits(sequence, 30) for sequence in (ids, other, ids)]
    for sequence, logits in zip((ids, other, ids), read, strict=True):
        whole = model(input_ids=torch.tensor([sequence])).logits[0, 29:-1].detach()
        torch.testing.assert_close(logits.log_softmax(-1), whole.log_softmax(-1), rtol=1e-3, atol=1e-4)


def test_buckets_follow_the_surest_model(folder):
    """The average of two bases lies between them, nearer to the surer."""
    model = METHODS["attention_buckets"][0](load(folder), {"multipliers": [1.0, 4.0]}).eval()
    ids = token_ids(length=30)
    each = [METHODS["single"][0](load(folder), {"multiplier": m}) for m in (1.0, 4.0)]
    probs = torch.stack([logits_of(one, ids).softmax(-1) for one in each])
    weights = probs.amax(-1, keepdim=True).softmax(0)
    torch.testing.assert_close(logits_of(model, ids).exp(), (weights * probs).sum(0), rtol=1e-4, atol=1e-6)


def test_ms_poe_divides_positions_by_every_ratio_once_and_spares_the_first_layers(folder):
    model = METHODS["ms_poe"][0](load(folder), {})
    ratios = [layer.self_attn.head_geometry.positions.exp() for layer in model.model.layers]
    heads = len(ratios[0])
    expected = 1.2 + 0.6 * torch.arange(heads) / heads
    for index, of_layer in enumerate(ratios):
        wanted = torch.ones(heads) if index < ms_poe.FIRST_LAYER else expected
        torch.testing.assert_close(of_layer.sort().values, wanted)


@pytest.mark.parametrize("how", score_mean.SCORE_MIXTURES)
def test_scores_of_equal_experts_mix_to_themselves(folder, monkeypatch, how):
    monkeypatch.setitem(routers.EXPERTS, "same", [(1.0, 1.0), (1.0, 1.0)])
    base = logits_of(load(folder))
    model = score_mean.make(load(folder), {"experts": "same", "equal": True, "scores": how})
    torch.testing.assert_close(logits_of(model), base, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", score_mean.SCORE_MIXTURES)
def test_mixed_scores_differ_from_mixed_probabilities(folder, how):
    equal = static.make(load(folder), {"equal": True})
    scores = score_mean.make(load(folder), {"equal": True, "scores": how})
    assert (logits_of(equal) - logits_of(scores)).abs().max() > 1e-4


def test_heads_frozen_to_their_best_have_one_expert_each(folder):
    model = fill(static.make(load(folder), {})).eval()
    layer = next(module for module in model.modules() if isinstance(module, MoICELayer))
    router = layer.moice_router["default"]
    query = torch.randn(1, layer.num_heads, 3, layer.head_dim)
    before = router.gates(router(query), 5)
    static.freeze_to_best(model)
    after = router.gates(router(query), 5)
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert torch.equal(after.sort(-1).values[..., -1], torch.ones_like(after[..., 0]))
    assert torch.equal(after.sum(-1), torch.ones_like(after[..., 0]))


def test_lora_of_equal_size_has_as_many_parameters_as_routers(tmp_path):
    """Within half a layer, for the shape of SmolLM2-135M."""
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    folder = save_tiny_model(tmp_path, num_hidden_layers=10, **shape)
    sizes = []
    for name in ("routers", "lora_q_equal"):
        make, options = METHODS[name]
        sizes.append(number_of_parameters(make(load(folder), options)))
    assert abs(sizes[0] - sizes[1]) <= 576


class First(random.Random):
    """Draws the first of everything."""

    def randrange(self, *args):
        return 0


@pytest.mark.parametrize("name", ["best_position", "perturbed_positions"])
def test_a_model_is_no_distance_from_itself_and_some_distance_elsewhere(tmp_path, name):
    folder, tokenizer = save_tiny_model(tmp_path, vocab_size=256), byte_tokenizer()
    model = routers.make(load(folder), {}).eval()
    text_ids = torch.arange(1200) % 90
    objective = objectives.OBJECTIVES[name]
    draws = [objectives.Draw(rng, "", text_ids, 1, True) for rng in (First(0), random.Random(1))]
    # The asked fact stands first already; the positions jump by nothing.
    assert objective(model, tokenizer, draws[0]).item() == pytest.approx(0.0, abs=1e-5)
    fill(model)
    loss = objective(model, tokenizer, draws[1])
    assert loss.item() > 1e-4
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tradeoff_joins_the_settings_of_a_method_and_tells_fourteen_apart():
    figure = plot_tradeoff({"routers": [(0.01, 0.4), (0.03, 0.6)], "LoRA": [(0.02, 0.9)]}, (0.0, 0.3), repair="right")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["routers"].get_xdata()) == [0.01, 0.03] and list(lines["routers"].get_ydata()) == [0.4, 0.6]
    assert list(lines["base model"].get_xdata()) == [0.0]
    lines = plot_tradeoff({str(i): [(0.01, 0.4)] for i in range(14)}, (0.0, 0.3), repair="right").axes[0].lines
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 15
    with pytest.raises(ValueError, match="at most 14"):
        plot_tradeoff({str(i): [(0.01, 0.4)] for i in range(15)}, (0.0, 0.3), repair="right")


def test_choices_show_the_expert_with_the_largest_gate():
    gates = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], [[0.3, 0.4, 0.3], [0.6, 0.2, 0.2]]])
    figure = plot_choices(gates, ["What", "is"], names=["own", "low", "high"], title="model")
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0, 2], [1, 0]]
    for number, entry in enumerate(figure.legends[0].legend_handles):
        assert to_hex(image.cmap(image.norm(number))) == to_hex(entry.get_color())
