"""Tasks ask for what they say, where they say."""

import gzip
import json
import random
import re

import pytest
from byte_models import byte_tokenizer

from peft_moice.evaluation import Facts, KeyValues, MultiDocument, Needles


def write_lines(file, records):
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt") as lines:
        lines.write("\n".join(map(json.dumps, records)))
    return file


def passages(tmp_path, number=9):
    records = [
        {"question": f"which {i}", "answers": [f"gold{i}"], "ctxs": [{"title": f"t{i}", "text": f"it is gold{i}"}]}
        for i in range(number)
    ]
    # Answers the first question, so it must never stand beside it.
    records.append({"question": "other", "answers": ["x"], "ctxs": [{"title": "t", "text": "GOLD0 and x"}]})
    return write_lines(tmp_path / "nq.jsonl.gz", records)


HAYSTACK = " ".join(f"Sentence number {index} says nothing." for index in range(200))


def tasks(tmp_path):
    pairs = [[[f"k{i}{j}", f"v{i}{j}"] for j in range(7)] for i in range(3)]
    file = write_lines(tmp_path / "kv.jsonl", [{"ordered_kv_records": pairs_} for pairs_ in pairs])
    needles = [Needles(HAYSTACK, byte_tokenizer(), kind) for kind in ("single", "keys", "values", "variables")]
    return [Facts(), KeyValues(), KeyValues(file=file), MultiDocument(passages(tmp_path)), *needles]


@pytest.mark.parametrize("index", range(8))
class TestTasks:
    def test_answers_stand_where_they_are_said_to(self, tmp_path, index):
        task = tasks(tmp_path)[index]
        length, positions = (2000, (0.0, 0.5, 1.0)) if task.unit == "tokens" else (7, (0.0, 0.5, 1.0))
        examples = task.draw(random.Random(3), length, positions)
        assert sorted(example.position for example in examples) == list(positions)
        assert {example.length for example in examples} == {length}
        # Variables are shown by an example first.
        prompts = {e.position: e.prompt[e.prompt.rindex("Memorize") if "VAR" in e.prompt else 0 :] for e in examples}
        places = {e.position: prompts[e.position].index(e.answers[0]) for e in examples}
        assert places[0.0] < 400 and len(prompts[1.0]) - places[1.0] < 400
        middle = (places[0.0] + places[1.0]) / 2
        assert places[0.5] == pytest.approx(middle, abs=0.15 * (places[1.0] - places[0.0]))

    def test_draws_depend_on_the_seed_alone(self, tmp_path, index):
        task = tasks(tmp_path)[index]
        length = 1000 if task.unit == "tokens" else 5
        first, again = ([task.draw(random.Random(seed), length, (0.0, 1.0)) for seed in range(5)] for _ in "ab")
        assert first == again
        assert any(draw != first[0] for draw in first)


def test_passages_that_answer_are_no_distractors(tmp_path):
    task = MultiDocument(passages(tmp_path))
    for seed in range(40):
        for example in task.draw(random.Random(seed), 6, (0.5,)):
            if example.answers == ("gold0",):
                assert "GOLD0" not in example.prompt
            shown = re.findall(r"Document \[(\d)\]\(Title: (.*?)\)", example.prompt)
            assert [int(number) for number, _ in shown] == [1, 2, 3, 4, 5, 6]
            assert len({title for _, title in shown}) == 6
    with pytest.raises(ValueError, match="`length` is 11"):
        task.draw(random.Random(0), 11, (0.0,))


def test_passages_given_with_a_question_are_its_distractors_in_their_order(tmp_path):
    shown = [{"title": f"t{i}", "text": f"text {i}", "isgold": i == 2} for i in range(5)]
    file = write_lines(tmp_path / "nq.jsonl", [{"question": "which", "answers": ["text 2"], "ctxs": shown}])
    task = MultiDocument(file)
    titles = {
        example.position: re.findall(r"Title: (.*?)\)", example.prompt)
        for example in task.draw(random.Random(0), 4, (0.0, 1 / 3, 1.0))
    }
    assert titles[0.0] == ["t2", "t0", "t1", "t3"] and titles[1 / 3] == ["t0", "t2", "t1", "t3"]
    assert titles[1.0] == ["t0", "t1", "t3", "t2"]
    with pytest.raises(ValueError, match="`length` is 6, but only 4 passages"):
        task.draw(random.Random(0), 6, (0.0,))


def test_haystacks_have_their_length_even_without_sentences():
    text, tokenizer = " | ".join(f"cell {index}" for index in range(2000)), byte_tokenizer()
    (example,) = Needles(text, tokenizer).draw(random.Random(0), 2000, (0.5,))
    assert 2000 < len(tokenizer(example.prompt)["input_ids"]) < 2800  # with the instruction, up to 40 words more
    with pytest.raises(ValueError, match="fewer than the haystack's 99999"):
        Needles(text, tokenizer).draw(random.Random(0), 99_999, (0.5,))


def test_haystacks_of_a_language_without_spaces():
    """In one line, as an article copied from the web."""
    text, tokenizer = "城市的夜晚很安静。" * 300, byte_tokenizer()
    examples = Needles(text, tokenizer).draw(random.Random(0), 900, (0.0, 0.5, 1.0))
    assert all(900 < len(tokenizer(example.prompt)["input_ids"]) < 1500 for example in examples)
    places = [example.prompt.index("One of the special magic numbers") for example in examples]
    assert [example.position for example in examples] == [1.0, 0.5, 0.0]
    assert places[0] > places[1] + 100 > places[2] + 200


def test_variables_form_one_chain_in_order():
    (example,) = Needles(HAYSTACK, byte_tokenizer(), "variables").draw(random.Random(0), 3000, (0.3,))
    shown, asked = example.prompt.split("\n\nMemorize")
    answered = tuple(shown.rpartition("they are: ")[2].split(", "))
    assert not set(answered) & set(example.answers) and "they are: " in example.opening
    for text, answers in ((shown, answered), (asked, example.answers)):
        (value,) = re.findall(r"assigned the value (\d+) in", text)
        steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
        assert [name for name, _ in steps] == list(answers) and len(steps) == 5
        assert [source for _, source in steps] == [value, *answers[:-1]]


@pytest.mark.parametrize(("kind", "hidden"), [("single", 1), ("keys", 4), ("values", 4)])
def test_numbers_are_hidden_and_asked_for_in_the_words_of_ruler(kind, hidden):
    (example,) = Needles(HAYSTACK, byte_tokenizer(), kind).draw(random.Random(0), 3000, (0.3,))
    needles = re.findall(r"One of the special magic numbers for (\w+) is: (\d{7})\.", example.prompt)
    assert len(needles) == hidden and len({key for key, _ in needles}) == (1 if kind == "values" else hidden)
    (key,) = re.findall(r"special magic numbers? for (\w+) mentioned in the provided text\?$", example.prompt)
    assert sorted(number for name, number in needles if name == key) == sorted(example.answers)
    assert example.opening.startswith(f"The special magic number{'s' * (kind == 'values')} for {key} mentioned in")


def test_files_are_drawn_from_without_repetition(tmp_path):
    records = [{"ordered_kv_records": [[f"k{i}", "v"]]} for i in range(6)]
    tasks_of_files = [
        MultiDocument(passages(tmp_path, number=5)),  # and one more
        KeyValues(file=write_lines(tmp_path / "kv.jsonl", records)),
    ]
    for task in tasks_of_files:
        rng = random.Random(0)
        draws = [task.draw(rng, 1, (0.0,))[0].prompt for _ in range(12)]
        assert len(set(draws[:6])) == len(set(draws[6:])) == 6
        assert draws[:6] != draws[6:]


def test_needs_files_in_their_format(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        KeyValues(file=tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"ordered_kv_records": []}\n{')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2: not JSON"):
        KeyValues(file=tmp_path / "broken.jsonl")
    with pytest.raises(ValueError, match=r"line 1: no 'question'"):
        MultiDocument(write_lines(tmp_path / "other.jsonl", [{"answers": []}]))
    with pytest.raises(ValueError, match=r"the question 'w5\?' has no answer"):
        MultiDocument(write_lines(tmp_path / "bare.jsonl", [{"question": "w5?", "answers": [], "ctxs": []}]))
