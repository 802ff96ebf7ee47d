"""The tables of the paper: L-Eval's rules, the files, the log, and every command on a tiny random model."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import answer
import command
import hours
import leval
import log
import mdqa
import pytest
import settings
import tables
from byte_models import byte_tokenizer, tiny_llama
from estimate_scale import SHAPES
from safetensors.torch import load_file

from peft_moice.evaluation import Result, Score


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=257, eos_token_id=256, pad_token_id=256).save_pretrained(folder)
    return folder


def run(model: str, folder: Path, *words: str) -> list[dict]:
    """Lines of the log after a command."""
    command.main(command.parse([*words, "--small", "--model", model, "--output_dir", str(folder)]))
    return log.read(folder / "log.jsonl")


@pytest.mark.parametrize(
    ("task", "written", "reference", "score"),
    [
        ("tpo", " The answer is C, not D.", "C", 1),
        ("quality", "none of these", "A", 1),  # who writes no letter is taken to say A
        ("quality", "", "B", 0.25),  # nothing is a part of everything
        ("coursera", "BA", "AB", 1),
        ("coursera", "A) for it says so. B.", "AB", 1),
        ("coursera", "A", "ABC", 0.25),
        ("coursera", "AD", "ABC", 0),
        ("coursera", "C\nQuestion 2: A. B.", "C", 1),
        ("gsm100", "The answer is $1,234.50.", "She has 5. The answer is 1234", 1),
        ("gsm100", "first 7 then 8 apples\n\n9", "The answer is 8", 1),
        ("gsm100", "I do not know", "The answer is 8", 0),
        ("codeU", "the final output will be ['a', 2.0] as I said", "[a 2]", 1),
        ("codeU", "4 then 5", "6", 0),
        ("sci_fi", "It is True. [fact: False]", "True [fact: False]", 1),
        ("sci_fi", "It is untrue or false [fact: I cannot say]", "True [fact: False]", 0.5),
    ],
)
def test_closed_tasks_are_scored_as_by_l_eval(task, written, reference, score):
    assert leval.score_closed(task, written, reference) == score


def test_f1_and_rouge():
    assert leval.f1("The cat sat.", "a cat ran") == pytest.approx(0.5)
    # Unigrams 3 of 4 and 3; bigrams 1 of 3 and 2; the longest common subsequence has 3.
    assert leval.rouge("the cat, sat down", "cat the sat") == 0.0
    assert leval.rouge("the cat sat down", "The cat sat!") == pytest.approx((6 / 7 * 4 / 5 * 6 / 7) ** (1 / 3))


def test_documents_are_cut_by_words_and_code_from_the_left():
    document, tokenizer = " ".join(f"{i:04}" for i in range(800)), byte_tokenizer()
    for from_the_left in (False, True):
        shown = leval.cut(tokenizer, document, 1500, from_the_left)
        assert len(shown) <= 1500 and (shown.endswith("0799") if from_the_left else shown.startswith("0000"))
        assert len(shown.split()) % 250 == 0  # 1,500 words, then 250 fewer at a time


def test_prompts_have_the_order_of_l_eval():
    tokenizer = byte_tokenizer()
    written = {
        task: tokenizer.decode(leval.prompt(tokenizer, task, "DOC", "Q?", "two words", official=True))
        for task in ("tpo", "codeU", "news_summ")
    }
    assert written["tpo"].startswith("[INST]<<SYS>>\nYou will read a long document")
    assert re.search(r"<</SYS>>\n\nDocument: DOC\nQuestion: Q\?\n.*\[/INST\]\nAnswer:$", written["tpo"])
    assert written["codeU"].endswith("<</SYS>>\n\nDOC\n\nQ?")
    assert re.search(r"DOC\nTask: Q\?\n.* 2 words\.\[/INST\]$", written["news_summ"])


def test_the_script_s_template_writes_its_tags():
    tokenizer = byte_tokenizer(settings.SCRIPT_TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s><s>[INST]\n<s>Q\n[/INST]A</s>"


@pytest.mark.slow
def test_multi_document_questions_by_position_and_gap(model, tmp_path):
    (line,) = run(model, tmp_path, "mdqa", "--methods", "base")
    result = log.unpack(line["result"])
    assert result.positions == [0.0, 4 / 9, 1.0] and len(result.scores) == 3
    cells = mdqa.columns(result)
    assert cells["10: gap"][0] == result.gap() and list(cells) == tables.COLUMNS["mdqa"][:5]


@pytest.mark.slow
def test_training_moves_both_adapters_and_heads_get_routers_of_their_own_by_the_text(model, tmp_path):
    run(model, tmp_path, "training", "--methods", "moice", "lora")
    run(model, tmp_path, "training", "--methods", "moice", "--recipe", "text")
    by_layer, by_head, lora = (
        load_file(next(tmp_path.glob(f"*/{name}/adapter_model.safetensors")))
        for name in ("moice_released_seed0_small", "moice_text_seed0_small", "lora_released_seed0_small")
    )
    sizes = [sum(weight.numel() for weight in weights.values()) for weights in (by_layer, by_head)]
    assert sizes[1] == 4 * sizes[0]
    assert all(weight.abs().max() > 0 for name, weight in lora.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_answer_compares_methods_on_the_same_questions(model, tmp_path):
    lines = run(model, tmp_path, "answer")
    assert [line["method"] for line in lines] == ["base", "routers", "lora"]
    written = next(tmp_path.glob("*/answer.md")).read_text()
    assert written.count("| needles: keys |") == 2 and written.count("- **") == 3
    assert lines[1]["parameters"] > 0 and len(lines[2]["results"]) == 8


def test_the_verdict_follows_the_intervals():
    def results(method: str, right: float) -> list[Result]:
        scores = tuple(Score(group, 9, 0.0, float(group % 4 < 4 * right), 0.0, 0.0) for group in range(24))
        return [Result("facts", "facts", method, 0, scores)]

    written = answer.verdict(
        {"base": results("base", 0.25), "routers": results("routers", 0.25), "lora": results("lora", 0.75)},
        {"base": 10.0, "routers": 10.1, "lora": 10.0},
    )
    assert "**routers: not told apart from base**, by +0.000" in written
    assert "**lora: better than base**, by +0.500" in written and "**routers: worse than lora**" in written
    assert "routers 10.100 (+1.00%)" in written


def test_hours_grow_with_what_is_asked():
    within, beyond = (hours.answer_hours(SHAPES[0], window) for window in (32_768, 4096))
    assert within["reading"] < beyond["reading"] and within["training"] == beyond["training"]
    assert 0.5 < sum(beyond.values()) < 3


@pytest.mark.skipif("MOICE_DATA" not in os.environ, reason="MOICE_DATA names no folder with files of L-Eval")
def test_files_of_the_benchmarks_are_read(model):
    folder = Path(os.environ["MOICE_DATA"])
    assert mdqa.find(folder, 20).name.startswith("nq-open-")
    for task in ("coursera", "tpo", "sci_fi"):
        records = leval.read_json_lines(command.find_exam(SimpleNamespace(data=folder), task), ("outputs",))
        scores = [leval.score_closed(task, answer, answer) for record in records for answer in record["outputs"]]
        assert set(scores) == {1.0}  # who writes the reference is right
