"""`peft-moice measure` on tiny models: table, scores, pictures, errors, Ctrl-C."""

import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_data import words
from tiny_models import decide, load, save_tiny_model, wide_config

from peft_moice import extend
from peft_moice.cli import measure
from peft_moice.cli.main import main
from peft_moice.cli.tables import difference, score_table, verdict
from peft_moice.evaluation import Result, Score, bootstrap_interval

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    adapted = get_peft_model(load(model), wide_config())
    decide(adapted)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def document(tmp_path) -> str:
    file = tmp_path / "notes.txt"
    file.write_text("\n\n".join(words(random.Random(i), 9) + "." for i in range(60)))
    return str(file)


@pytest.fixture
def options(tmp_path) -> list[str]:
    small = "--lengths 120 60 --items 3 --questions 2 --positions 0 1 --chunk_length 64"
    return [*small.split(), "--output_dir", str(tmp_path / "out")]


def error(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(["measure", *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_table_scores_and_pictures_of_an_adapter_beside_its_base(model, adapter, document, options, tmp_path, capsys):
    argv = ["measure", "--adapter", adapter, "--documents", document, "--tasks", "needles", "key_values", *options]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for part in ("needles: single", "key-value retrieval", "120 tokens", "3 pairs", f"{Path(model).name} with mine"):
        assert part in printed
    assert printed.count("perplexity of your documents") == 2
    change = r"needles: single: mine: \+0\.00 in the mean \(-[\d.]+ to \+[\d.]+, paired\), gap 0\.00 to 0\.00, perpl"
    assert re.search(change + r"exity [+-][\d.]+%\.\n", printed)
    out = tmp_path / "out"
    for name in ("needles__single_0", "needles__single_1", "needles__single", "key_value_retrieval", "losses"):
        assert (out / f"{name}.png").is_file(), name
    base, adapted = (Result.load(out / f"needles__single_{i}.json") for i in (0, 1))
    assert base.lengths == [60, 120] and base.positions == [0.0, 1.0] and len(base.scores) == 8
    assert base.mean("loss") != adapted.mean("loss")


def test_an_extension_is_measured_on_both_sides_of_the_window(tmp_path, document, options, capsys):
    base = save_tiny_model(tmp_path / "short", max_position_embeddings=64)
    extend(load(base)).save_pretrained(tmp_path / "longer")
    argv = ["--adapter", str(tmp_path / "longer"), "--documents", document, "--tasks", "needles", *options[:-4]]
    assert main(["measure", *argv, *options[-2:]]) == 0
    within, beyond = zip(*re.findall(r"([\d.]+) within, ([\d.]+) beyond", capsys.readouterr().out), strict=True)
    assert within[0] == within[1] and beyond[0] != beyond[1]
    own, longer = json.loads((tmp_path / "out" / "losses.json").read_text()).values()
    assert own["edges"] == [2, 4, 8, 16, 32, 64, 120]
    assert own["losses"][:6] == pytest.approx(longer["losses"][:6], abs=1e-6)
    assert float(beyond[1]) == pytest.approx(longer["losses"][6], abs=1e-3)


def test_without_documents_facts_are_asked(model, options, tmp_path, capsys):
    assert main(["measure", "--model", model, *options, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["interrupted"] is False and values["output_dir"] == str(tmp_path / "out")
    (one,) = values["models"]
    (task,) = one["tasks"]
    assert (task["task"], one["perplexity"]) == ("facts", None)
    assert [(cell["length"], cell["position"], cell["questions"]) for cell in task["cells"]] == [(3, 0, 2), (3, 1, 2)]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["facts_0.json", "facts_0.png"]


def test_what_cannot_be_asked_shows_before_the_model_is_loaded(model, document, options, tmp_path, capsys):
    """The folder has a tokenizer and no weights."""
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    argv = ["--model", str(folder), *options]
    assert "--tasks names ['needle']" in error(capsys, *argv, "--tasks", "needle")
    assert "--documents was not given holds none" in error(capsys, *argv, "--tasks", "keys")
    assert "gone.txt: there is no such file" in error(capsys, *argv, "--documents", "gone.txt")
    assert "fewer than the haystack's 5000" in error(capsys, *argv, "--documents", document, "--lengths", "5000")
    assert "`num_facts` is 68, but has to lie in 1..67" in error(capsys, *argv, "--items", "3", "68")
    assert "`positions` has to hold numbers in 0..1" in error(capsys, *argv, "--positions", "50")
    assert "`num_groups` is 0" in error(capsys, *argv, "--questions", "0")
    assert "`lengths` names a value twice: [3, 3]" in error(capsys, *argv, "--items", "3", "3")
    assert "`positions` names a value twice: [0.5, 0.5]" in error(capsys, *argv, "--positions", "0.5", "0.5")
    assert "invalid choice: 'fp16'" in error(capsys, *argv, "--dtype", "fp16")
    (folder / "chat_template.jinja").write_text("{{ messages[0].name.first }}")
    assert "the chat template of the tokenizer refuses this chat" in error(capsys, *argv)


def test_no_pictures_are_named_without_matplotlib(model, options, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["measure", "--model", model, *options]) == 0
    assert f"Scores are in {tmp_path / 'out'}." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["facts_0.json"]


def test_adapters_of_any_type_side_by_side(model, adapter, document, options, tmp_path, capsys):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    folders = {"lora": get_peft_model(load(model), lora), "prompt": get_peft_model(load(model), prompt)}
    for name, adapted in folders.items():
        adapted.save_pretrained(tmp_path / name)
    several = [adapter, *(str(tmp_path / name) for name in folders)]
    argv = ["--documents", document, "--tasks", "needles", *options, "--lengths", "60"]
    assert main(["measure", "--adapter", *several, *argv]) == 0
    printed = capsys.readouterr()
    assert all(f"needles: single: {name}: " in printed.out for name in ("mine", "lora", "prompt"))
    assert "4 questions about prompts of up to 122 tokens, put to 4 models in turn." in printed.err
    assert re.search(r"The first 2 took ([\d.e-]+) seconds; all take about [\d.e-]+ seconds\.", printed.err)
    together = [Result.load(tmp_path / "out" / f"needles__single_{i}.json").mean("loss") for i in range(4)]
    assert len(set(together)) == 4
    for number, folder in enumerate(several, start=1):  # each as if the others were not there
        assert main(["measure", "--adapter", folder, *argv]) == 0
        alone = Result.load(tmp_path / "out" / "needles__single_1.json").mean("loss")
        assert alone == pytest.approx(together[number], rel=1e-6)
    assert "names one twice" in error(capsys, "--adapter", adapter, adapter, *options)


def test_a_task_that_is_named_twice_is_asked_once(model, document, options, tmp_path):
    argv = ["--documents", document, "--tasks", "needles", "needles", *options]
    assert main(["measure", "--model", model, *argv]) == 0
    assert len(Result.load(tmp_path / "out" / "needles__single_0.json").scores) == 8  # 2 lengths, positions, questions


def test_perplexity_says_over_how_much_it_is_or_why_it_is_missing(model, document, options, capsys):
    argv = ["measure", "--model", model, "--documents", document, "--tasks", "facts", *options]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert f"perplexity of your documents (512 tokens), {Path(model).name}: " in printed.out  # of 540
    assert "not measured" not in printed.err
    assert main([*argv, "--chunk_length", "541"]) == 0
    printed = capsys.readouterr()
    assert "perplexity of" not in printed.out
    assert "not measured: the documents have 540 tokens, fewer than a chunk (--chunk_length 541)" in printed.err


def test_the_pace_of_the_first_draw_counts_for_all_by_their_tokens(model, caplog, monkeypatch):
    """Of 30 tokens in a second: the draws of all tasks, lengths and models have 2 x 3 x (30 + 60 + 90) tokens."""
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure, "evaluate", lambda *args, **kwargs: None)
    args = measure.Arguments(adapter=["a"], questions=3)
    with caplog.at_level("INFO", "peft_moice"):
        measure.tell_pace(None, None, (None, [2, 1]), [{1: 30, 2: 60}, {5: 90}], args)
    assert "The first 5 took 1 seconds; all take about 36 seconds." in caplog.text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.034, "0.034 seconds"), (75, "75 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_durations_in_the_units_that_people_say(seconds, words):
    assert measure.in_words(seconds) == words


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_ctrl_c_keeps_what_is_finished(model, adapter, options, tmp_path, capsys, monkeypatch, calls):
    """The first call is for the pace, the fourth the first of the adapter."""
    evaluate, done = measure.evaluate, []

    def interrupted(*args, **kwargs):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(evaluate(*args, **kwargs))
        return done[-1]

    monkeypatch.setattr(measure, "evaluate", interrupted)
    argv = ["measure", "--adapter", adapter, *options, "--tasks", "facts", "--items", "3", "4"]
    assert main(argv) == 130
    printed, written = capsys.readouterr().out, sorted(path.name for path in (tmp_path / "out").glob("*.json"))
    if calls == 1:
        assert printed == "" and written == []
        return
    assert "Interrupted: this is what was finished." in printed
    assert written == (["facts_0.json"] if calls == 2 else ["facts_0.json", "facts_1.json"])
    assert Result.load(tmp_path / "out" / "facts_0.json").lengths == ([3] if calls == 2 else [3, 4])
    assert (tmp_path / "out" / "facts_0.png").is_file()


def result(*shares: float, model: str = "m", questions: int = 20) -> Result:
    """A result with these shares of right answers, by position."""
    positions = [index / (len(shares) - 1) for index in range(len(shares))]
    scores = [
        Score(group, 30, position, float(group < share * questions), 1.0, 0.5)
        for position, share in zip(positions, shares, strict=True)
        for group in range(questions)
    ]
    return Result("facts", "facts", model, 0, tuple(scores))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1.0, 0.2, 0.9), "answers right 100% at 0% of the prompt and 20% at 50%. It loses what stands there"),
        ((1.0, 0.95, 0.9), "no position is clearly worse"),
        ((0.05, 0.0, 0.05), "hardly answers anywhere"),
    ],
)
def test_the_verdict(shares, expected):
    assert expected in verdict(result(*shares))


def test_what_an_adapter_changed_is_paired():
    before, after = result(1.0, 0.2, 0.6), result(1.0, 0.8, 1.0, model="n")
    mean, interval = after.difference(before)
    assert mean == pytest.approx(1 / 3)
    assert interval == bootstrap_interval([[0.0, float(4 <= i < 16), float(i >= 12)] for i in range(20)])
    said = difference("routers", after, before)
    assert said.startswith("facts: routers: +0.33 in the mean (+0.2") and said.endswith("paired), gap 0.80 to 0.20")
    mean, (low, high) = before.difference(before)
    assert mean == 0 and low < -0.05 and high > 0.05
    with pytest.raises(ValueError, match="were not asked the same questions"):
        after.difference(result(1.0, 0.2))


def test_the_table_has_a_row_for_each_model_and_a_mean():
    lines = score_table([result(1.0, 0.5), result(0.0, 1.0, model="n")]).splitlines()
    assert lines[1].split() == ["30", "facts", "at", "0%", "at", "100%", "mean"]
    assert [line.split()[0] for line in lines[2:]] == ["m", "n"]
    assert [cell for cell in lines[2].split() if "[" not in cell and "]" not in cell] == ["m", "1.00", "0.50", "0.75"]
