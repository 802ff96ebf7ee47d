"""The examples on tiny models: they run, and do what they say."""

import csv
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from tiny_data import TEMPLATE, words, write_data
from tiny_models import adapted_model, load, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM, TrainingArguments

from peft_moice.evaluation import Result, sample_facts
from peft_moice.standalone.built_in import BuiltInRouters
from peft_moice.training.data import DataArguments
from peft_moice.tuner.pretraining import add_routers

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path += [str(EXAMPLES / folder) for folder in ("research/paper", "research", "benchmarks")]

import choose_angles  # noqa: E402
import command as paper  # noqa: E402
import evaluate as evaluate_example  # noqa: E402
import make_facts  # noqa: E402
import train_from_scratch  # noqa: E402
import train_router  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def test_added_routers_and_their_balance_loss_survive_the_disk(model, tmp_path):
    config, ids = wide_config(router_aux_loss_coef=0.5), token_ids()
    built = add_routers(load(model), config).train()
    assert config.rope_bases is None and config.target_modules is None  # it can be used again
    built.save_pretrained(tmp_path)
    outputs = built(ids, labels=ids)
    outputs.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in built.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()(ids, labels=ids)
    assert (loaded.loss.item(), loaded.aux_loss.item()) == (outputs.loss.item(), outputs.aux_loss.item())
    task = built.eval()(ids, labels=ids).loss.item()
    assert outputs.loss.item() == pytest.approx(task + 0.5 * outputs.aux_loss.item())


def test_from_scratch_compares_like_with_like(tmp_path):
    sizes = {"hidden_size": 64, "layers": 2, "heads": 2, "length": 64, "steps": 3, "eval_windows": 4}
    sizes["threads"] = torch.get_num_threads()
    train_from_scratch.main(train_from_scratch.Arguments(output_dir=str(tmp_path), seeds=[0, 1], **sizes))
    results = json.loads((tmp_path / "results.json").read_text())
    runs = {(run["routers"], run["seed"]): run for run in results["runs"]}
    without, with_routers = runs["without", 0], runs["with", 0]
    assert 1 < with_routers["parameters"] / without["parameters"] < 1.01
    for name in ("within_length", "by_position"):
        assert results["difference"][name]
    mean = sum(runs["with", s]["loss_within_length"] - runs["without", s]["loss_within_length"] for s in (0, 1)) / 2
    assert results["difference"]["within_length"][0] == pytest.approx(mean, abs=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with_routers")
    routers = [module for module in loaded.modules() if isinstance(module, BuiltInRouters)]
    assert len(routers) == 2
    assert loaded.config.moice["routers"][0]["router_aux_loss_coef"] == 0.01


def test_from_scratch_starts_both_models_from_the_same_weights():
    args = train_from_scratch.Arguments(hidden_size=32, layers=1, heads=2)
    without, with_routers = (
        train_from_scratch.make_model(args, seed=3, with_routers=flag).state_dict() for flag in (False, True)
    )
    assert all(torch.equal(weight, with_routers[name]) for name, weight in without.items())
    assert with_routers.keys() - without.keys() == {
        f"model.layers.0.self_attn.moice_routers.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_losses_by_position():
    """A model of equal logits loses log 256 everywhere; parts of a window are means of their own positions."""
    args = train_from_scratch.Arguments(hidden_size=32, layers=1, heads=2)
    model = train_from_scratch.make_model(args, seed=0, with_routers=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    losses = train_from_scratch.measure(model, torch.randint(256, (6, 8)))
    torch.testing.assert_close(losses, torch.full((6, 7), math.log(256)))
    by_token = torch.arange(1.0, 8.0)[None]  # of the bytes at positions 1 to 7
    assert train_from_scratch.by_bucket(by_token, 4).tolist() == [[1.0, 2.5, 4.5, 6.5]]


def test_train_router_trains_and_leaves_an_adapter_with_a_card(model, tmp_path, capsys):
    file, folder = write_data(tmp_path, "messages"), tmp_path / "out"
    args = train_router.Arguments(model, keep_tokens=16)
    training = TrainingArguments(
        str(folder), use_cpu=True, max_steps=2, learning_rate=0.1, remove_unused_columns=False
    )
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    train_router.main(args, DataArguments([file], eval_files=[file], chat_template=str(template)), training)
    assert "eval_loss" in capsys.readouterr().out
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "import peft_moice" in (folder / "README.md").read_text()
    assert PeftConfig.from_pretrained(folder).rope_bases == [10_000, 15_000, 20_000, 30_000, 40_000]
    trained = AutoPeftModelForCausalLM.from_pretrained(folder)
    scales = [weight for name, weight in trained.named_parameters() if "identity_scale" in name]
    assert scales and all(scale.abs().min() > 0 for scale in scales)


def test_evaluate_measures_both_models_and_draws(model, tmp_path, capsys):
    adapted_model(model).save_pretrained(tmp_path / "adapter")
    document = tmp_path / "notes.txt"
    document.write_text("\n\n".join(words(random.Random(i), 9) + "." for i in range(60)))
    for documents, lengths in (([], [3]), ([str(document)], [60, 120])):
        folder = tmp_path / f"out{len(documents)}"
        options = {"documents": documents, "lengths": lengths, "questions": 1, "output_dir": str(folder)}
        evaluate_example.main(evaluate_example.Arguments(model, str(tmp_path / "adapter"), **options))
        base, moice = (Result.load(folder / f"{name}.json") for name in ("base_model", "adapter"))
        assert base.lengths == moice.lengths == lengths
        # To the tiny tokenizer, names and codes are all the same.
        assert (base.mean("loss") != moice.mean("loss")) == bool(documents)
        assert (folder / "positions.png").is_file()
    assert "adapter, 120 tokens: 0.00 at 0%, " in capsys.readouterr().out


def test_choose_angles_starts_with_the_own_angle(model, capsys):
    choose_angles.main(choose_angles.Arguments(model, multipliers=[0.5, 2.0], num_experts=2, facts=3, prompts=1))
    printed = capsys.readouterr().out
    assert "  0.50 times: mean loss" in printed
    assert "In the order of their use: [1.0, " in printed


def test_the_shipped_chats_are_those_that_the_generator_makes(tmp_path):
    """And their answers are right, about names and codes that evaluation does not ask for."""
    make_facts.main(make_facts.Arguments(file=str(tmp_path / "facts.jsonl")))
    made = (tmp_path / "facts.jsonl").read_text()
    assert made == (EXAMPLES / "data" / "facts.jsonl").read_text()
    evaluated = sample_facts(67, random.Random(0)).names
    for line in made.splitlines():
        messages = json.loads(line)["messages"]
        assert len(messages) == 8 and not any(name in messages[0]["content"].split() for name in evaluated)
        assert all(answer["content"] in messages[0]["content"] for answer in messages[1::2])


def test_a_table_of_the_paper_is_trained_measured_logged_and_drawn(model, tmp_path):
    words = ["leval", "--small", "--model", model, "--output_dir", str(tmp_path), "--methods", "base", "moice"]
    paper.main(paper.parse([*words, "--tasks", "tpo", "financial_qa"]))
    lines = (tmp_path / "log.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    by_table = {(line["table"], line["method"], line["task"]) for line in records}
    tasks = {("leval", method, task) for method in ("base", "moice") for task in ("tpo", "financial_qa")}
    assert by_table == {*tasks, ("training", "moice", "training")}
    assert all(
        line["versions"]["torch"] == torch.__version__ and "sha256" in line.get("data", "sha256") for line in records
    )
    paper.main(paper.parse([*words, "--tasks", "tpo", "financial_qa"]))
    assert (tmp_path / "log.jsonl").read_text() == lines  # nothing is asked twice
    header, *rows = csv.reader((tmp_path / "leval.csv").open())
    drawn = {tuple(row[:3]): dict(zip(header[3:], row[3:], strict=True)) for row in rows}
    scores = [score for *_, score in records[0]["result"]["scores"]]
    assert drawn[model, "base", "ours (small), seed 0"]["tpo"].startswith(f"{sum(scores) / len(scores):.3f} (")
    assert drawn[model, "base", "ours (small), seed 0"]["gsm100"] == "empty"
    assert " to " in drawn[model, "moice (released)", "ours (small), seed 0, minus base"]["financial_qa"]
    for method, source in (("moice", "official code"), ("pos2distill", "paper")):
        assert set(drawn["meta-llama/Llama-2-7b-chat-hf", method, source].values()) == {"empty"}
    assert (tmp_path / "leval.tex").read_text().count(r"\\") == len(rows) + 1
    assert len(next(tmp_path.glob("*/predictions/moice/tpo.pred.jsonl")).read_text().splitlines()) == 1
