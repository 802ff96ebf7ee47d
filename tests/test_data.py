"""Data for training: sources, formats, sequences, batches."""

import gzip
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tiny_data import TEMPLATE, records, words, write_data
from tiny_models import load, save_tiny_model, wide_config
from transformers import AutoTokenizer, ByT5Tokenizer

from peft_moice.evaluation import sample_facts
from peft_moice.training.data import (
    DataArguments,
    document_chats,
    encode_chat,
    load_examples,
    make_collator,
    pack,
    plain_text,
    read_source,
    read_text,
)
from peft_moice.training.data.chats import read_chats
from peft_moice.tuner.pretraining import add_routers

FACT = re.compile(r"The access code of (\w+) is (\d{5})\.")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def chats(file: str | Path, data_format: str = "auto") -> list[list[dict[str, str]]]:
    return [messages for _, messages in read_chats(read_source(str(file)), data_format)]


class TestSources:
    @pytest.mark.parametrize("data_format", ["messages", "sharegpt", "prompt_answer", "alpaca"])
    def test_all_formats_say_the_same_and_are_known_by_their_columns(self, tmp_path, data_format):
        read = chats(write_data(tmp_path, data_format))
        assert [chat[:2] for chat in read] == chats(write_data(tmp_path, "prompt_answer"))
        assert read == chats(write_data(tmp_path, data_format), data_format)

    @pytest.mark.parametrize("data_format", ["messages", "sharegpt", "alpaca"])
    def test_all_kinds_of_files_say_the_same(self, tmp_path, data_format):
        datasets = pytest.importorskip("datasets")
        expected = chats(write_data(tmp_path, data_format))
        rows = records(data_format)
        array, packed, parquet = (tmp_path / name for name in ("a.json", "a.jsonl.gz", "a.parquet"))
        array.write_text(json.dumps(rows, indent=1))
        packed.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        datasets.Dataset.from_list(rows).to_parquet(parquet)
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        for file in (array, packed, parquet, tmp_path / "saved"):
            assert chats(file) == expected, file

    def test_a_data_set_of_several_splits(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        folder = tmp_path / "set"
        folder.mkdir()
        for split, seed in (("train", 0), ("test", 1)):
            Path(write_data(folder, "alpaca", seed)).rename(folder / f"{split}.jsonl")
        expected = [chats(folder / f"{split}.jsonl") for split in ("train", "test")]
        assert chats(folder) == expected[0]
        assert chats(f"{folder}:test") == expected[1]
        assert chats(f"{folder}:train[:3]") == expected[0][:3]
        with pytest.raises(ValueError, match="the split 'validation' of this data set cannot be read"):
            chats(f"{folder}:validation")

    def test_further_fields_of_formats(self, tmp_path):
        file = tmp_path / "data.jsonl"

        def read(record: dict, data_format: str = "auto") -> list[dict[str, str]]:
            file.write_text(json.dumps(record))
            return chats(file, data_format)[0]

        system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
        answer = {"role": "assistant", "content": "a"}
        turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
        assert read({"conversations": turns, "system": "s"}) == [system, user, answer]
        assert read({"conversations": [{"from": "system", "value": "s"}, *turns]}) == [system, user, answer]
        assert read({"conversations": [user, answer]}) == [user, answer]
        two_parts = {"role": "user", "content": "u\n\ni"}
        assert read({"instruction": "u", "input": "i", "output": "a"}) == [two_parts, answer]
        assert read({"instruction": "u", "output": "a", "system": "s"}) == [system, user, answer]
        assert read({"prompt": "u", "completion": "a"}) == read({"prompt": "u", "response": "a"}) == [user, answer]
        assert read({"prompt": [system, user], "completion": [answer]}) == [system, user, answer]
        for context in ("w5", ["w5"]):
            for answers in (["a", "w7"], "a", {"text": ["a", "w7"], "answer_start": [0, 3]}):
                retrieval = read({"question": "w8?", "context": context, "answers": answers, "id": 7})
                assert retrieval == [{"role": "user", "content": "w5\n\nw8?"}, answer]

    def test_tables_with_a_header(self, tmp_path):
        """As strings: a code keeps its zeros, and "NA" is an answer."""
        rows = 'query,passage,label\n"which, then?","w5\nw6",0073\nwho?,w7,NA\n'
        for name, content in (("a[1].csv", rows.encode()), ("a.csv.gz", gzip.compress(rows.encode("utf-8-sig")))):
            (tmp_path / name).write_bytes(content)
            columns = {"question": "query", "context": "passage", "answer": "label"}
            read = [chat for _, chat in read_chats(read_source(str(tmp_path / name)), columns=columns)]
            said = [[message["content"] for message in chat] for chat in read]
            assert said == [["w5\nw6\n\nwhich, then?", "0073"], ["w7\n\nwho?", "NA"]]
        long = "w5 " * 50_000
        (tmp_path / "long.csv").write_text(f"prompt,answer\n{long},w6\n")
        assert chats(tmp_path / "long.csv")[0][0]["content"] == long

    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path):
        expected = chats(write_data(tmp_path, "messages"))
        for name, content in (("a.jsonl", "\n".join(map(json.dumps, records("messages")))), ("a.txt", "w5 w6")):
            (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert chats(tmp_path / "a.jsonl") == expected
        assert read_text(tmp_path / "a.txt") == "w5 w6"

    def test_names_are_told_apart(self, tmp_path):
        for name in ("tatsu-lab/alpaca", "HuggingFaceH4/ultrachat_200k:train_sft[:100]", "owner/set-v1.5"):
            assert read_source(name).kind == "dataset"
        for name in ("gone.jsonl", "data/gone.jsonl", "gone", "../gone/data.parquet"):
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: there is no such file.*OWNER/NAME"):
                read_source(name)
        with pytest.raises(ValueError, match=r"is a folder\. Name the files of text in it, such as .*\*\.txt"):
            read_text(tmp_path)

    def test_damaged_archives_are_named(self, tmp_path):
        whole = gzip.compress(b'{"prompt": "w5", "answer": "w6"}\n' * 500)
        for name, content in (("cut", whole[:60]), ("mixed", whole[:30] + b"x" * 30), ("plain", b"w5 w6")):
            (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz cannot be decompressed .* again\."):
                chats(tmp_path / f"{name}.jsonl.gz")
        pytest.importorskip("pyarrow")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(ValueError, match=r"a\.parquet: this file cannot be read \("):
            chats(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("data_format", "content", "message"),
    [
        ("messages", b'{"messages": []}\n', r"line 1: there is no answer"),
        ("messages", b'\n{"messages": [{"role": "user"}]}\n', r"line 2: every message needs a 'role' and a 'content'"),
        ("messages", b'{"messages": [{"role": "assistant", "content": "w5"}]}', r"line 1: the first message is an"),
        ("messages", b'{"prompt": "w5", "answer": "w6"}', r"line 1: no 'messages'"),
        ("prompt_answer", b'{"prompt": "w5", "answer": "w6"}\n{"prompt": "w5"}\n', r"line 2: no 'answer'"),
        ("prompt_answer", b'{"prompt": "w5", "answer": 6}\n', r"line 1: every message needs .* both strings"),
        ("prompt_answer", b'{"prompt": "w5", "answer": ""}\n', r"line 1: there is no answer"),
        ("prompt_answer", b'{"prompt": "w5 \\ud83d", "answer": "w6"}', r"line 1: a message holds '\\ud83d', half of"),
        ("prompt_answer", b'"w5"\n', r"line 1: a record has to be an object"),
        ("auto", b'"w5"\n', r"line 1: a record has to be an object"),
        ("auto", b'{"text": "w5"}\n', r"line 1: the columns \['text'\] are of no known format"),
        ("auto", b'[{"prompt": "w5", "answer": "w6"}, {"prompt": "w5"}]', r"record 2: no 'answer'"),
        ("auto", b'[{"prompt": "w5",\n "answer": w6}]', r"line 2: not JSON"),
        ("auto", b"w5 w6\n", r"line 1: not JSON .* for plain text, say data_format text or documents"),
        ("sharegpt", b'{"conversations": [{"from": "tool", "value": "w5"}]}', r"line 1: a message is from 'tool'"),
        ("sharegpt", b'{"conversations": "w5"}', r"line 1: 'conversations' has to be a list"),
        ("question_answer", b'{"question": "w5", "context": "w6", "answers": []}', r"line 1: there is no answer"),
        ("question_answer", b'{"question": "w5", "context": {}, "answers": "w6"}', r"'context' a string or a list"),
        ("question_answer", b'{"question": "w5", "answers": "w6"}', r"line 1: no 'context'"),
        ("alpaca", b'{"instruction": "w5", "input": 3, "output": "w5"}', r"line 1: 'instruction' and 'input' have"),
        ("prompt_answer", b'{"prompt": "w5", "answer": "w6"}\n{"prompt"\n', r"line 2: not JSON"),
        ("prompt_answer", b'{"prompt": "w5", "answer": "w6"}\n\xff\n', r"line 2: not UTF-8"),
        ("prompt_answer", b"", r"is empty"),
        ("messages", b"\n \n", r"is empty"),
        ("messages", b"[]", r"is empty"),
        ("text", b"", r"line 1: there is no text"),
        ("text", b"w5 w6\nw7 \xff", r"line 2: not UTF-8"),
        ("documents", b"w5 w6. w7 w8.", r"1 passages of 16 words, too few for documents_per_prompt 4"),
    ],
)  # fmt: skip
def test_bad_files(tokenizer, tmp_path, data_format, content, message):
    file = tmp_path / "data"
    file.write_bytes(content)
    args = DataArguments([str(file)], data_format=data_format, documents_per_prompt=4, passage_words=16)
    with pytest.raises(ValueError, match=message) as raised:
        load_examples([str(file)], tokenizer, args, quiet=True)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "values", "message"),
    [
        ("a.csv", "prompt,answer\nw5,w6,w7\n", {}, r"line 2: another number of values"),
        ("a.csv", "prompt,answer\nw5\n", {}, r"line 2: another number of values"),
        ("a.csv", 'prompt,answer\n"w5"x,w6\n', {}, r"line 2: not CSV"),
        ("a.csv", "prompt,answer\n", {}, r"is empty"),
        ("a.csv", "prompt,answer\nw5,w6\n", {"columns": ["answer=label"]}, r"no column 'label', .* prompt, answer"),
        ("a.csv", "prompt,answer\nw5,w6\n", {"columns": ["answer"]}, r"holds 'answer', but is made of NAME=COLUMN"),
        ("a.csv", "prompt,answer\nw5,w6\n", {"loss_on": "answer"}, "'answer'; choose 'answers' or 'all'"),
        ("a.csv", "prompt,answer\nw5,w6\n", {"data_format": "chatml"}, "'chatml'; choose one of auto, messages"),
        ("a.txt", "w5.", {"data_format": "documents", "documents_per_prompt": 0}, "documents_per_prompt is 0"),
        ("a.txt", "w5.", {"data_format": "documents", "documents_per_prompt": 68}, "documents_per_prompt is 68"),
        ("a.txt", "w5.", {"data_format": "documents", "questions": 31}, r"questions is 31, but has to lie in 1\.\.30"),
        ("a.txt", "w5.", {"data_format": "documents", "passage_words": -1}, "passage_words is -1"),
    ],
)
def test_bad_tables_and_arguments(tokenizer, tmp_path, name, content, values, message):
    (tmp_path / name).write_text(content)
    file = str(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_examples([file], tokenizer, DataArguments([file], **values), quiet=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_right_with_or_without_a_token_for_it(tokenizer, side):
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side=side)
    own.pad_token = None
    sequences = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([5, 6, 7], [8, 9])]
    batch = make_collator(own)([[sequence] for sequence in sequences])
    assert batch["input_ids"][:, :2].tolist() == [[5, 6], [8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert own.pad_token is None and own.padding_side == side


def test_plain_text_beside_other_formats_is_refused(tmp_path, tokenizer):
    text, file = write_data(tmp_path, "text"), write_data(tmp_path, "messages")
    assert load_examples([text], tokenizer, quiet=True)[0][0]["labels"][0] != -100
    with pytest.raises(ValueError, match="is plain text, but other files are not"):
        load_examples([text, file], tokenizer, quiet=True)
    for data_format in ("text", "documents"):
        with pytest.raises(ValueError, match=f"holds records, and the format {data_format} reads plain text"):
            load_examples([file], tokenizer, DataArguments([file], data_format=data_format), quiet=True)
    with pytest.raises(ValueError, match="is plain text, which the format alpaca does not read"):
        load_examples([text], tokenizer, DataArguments([text], data_format="alpaca"), quiet=True)


def test_the_plain_text_of_chats_is_what_users_say(tmp_path):
    text, file = write_data(tmp_path, "text"), write_data(tmp_path, "sharegpt")
    assert plain_text([text]) == Path(text).read_text()
    assert plain_text([file]) == "\n\n".join(record["conversations"][0]["value"] for record in records("sharegpt"))


def test_labels_are_the_answers_and_the_end_of_their_turns(tokenizer):
    messages = [
        {"role": "user", "content": "w10 w11"},
        {"role": "assistant", "content": "w12"},
        {"role": "user", "content": "w13"},
        {"role": "assistant", "content": "w14 w15"},
    ]
    with_template = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    with_template.chat_template = TEMPLATE
    encoded = encode_chat("here", messages, with_template, "answers")
    assert encoded["input_ids"] == [2, 10, 11, 4, 3, 12, 4, 2, 13, 4, 3, 14, 15, 4]
    assert encoded["labels"] == [*[-100] * 5, 12, 4, *[-100] * 4, 14, 15, 4]
    assert encode_chat("here", messages, with_template, "all")["labels"] == encoded["input_ids"]

    encoded = encode_chat("here", messages, tokenizer, "answers")
    assert encoded["input_ids"] == [10, 11, 12, 13, 14, 15]
    assert encoded["labels"] == [-100, -100, 12, -100, 14, 15]


def test_a_tokenizer_that_cannot_tell_answers_is_refused():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match="ByT5Tokenizer cannot map tokens to characters"):
        encode_chat("line 1", chat, ByT5Tokenizer())
    whole = encode_chat("line 1", chat, ByT5Tokenizer(), loss_on="all")
    assert whole["labels"] == whole["input_ids"] and len(whole["labels"]) >= len("hi\nyes")


def test_a_template_that_rewrites_earlier_answers_is_refused(tokenizer):
    rewriting = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }} {% endfor %}"
    )
    turn = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w11"}]
    with pytest.raises(ValueError, match=r"data.jsonl, line 3: the chat template writes message 1 differently"):
        encode_chat("data.jsonl, line 3", turn * 2, rewriting, "answers")


def test_packed_chats_do_not_see_each_other(model, tokenizer):
    rng = random.Random(0)
    turns = [
        [{"role": "user", "content": words(rng, n)}, {"role": "assistant", "content": words(rng, 4)}]
        for n in (3, 9, 6)
    ]
    sequences = [encode_chat("here", chat, tokenizer, "answers") for chat in turns]
    packed = pack(sequences, max_length=23)
    assert [[len(sequence["input_ids"]) for sequence in row] for row in packed] == [[7, 13], [10]]

    collate, packing = make_collator(tokenizer), make_collator(tokenizer, packing=True)
    adapted = add_routers(load(model), wide_config(router_aux_loss_coef=0.0)).eval()
    with torch.no_grad():
        padded = adapted(**collate([[sequence] for sequence in sequences]), use_cache=False)
        in_one_row = adapted(**packing([sequences[:2], sequences[2:]]), use_cache=False)
        seeing = adapted(input_ids=packing([sequences])["input_ids"], use_cache=False)
    assert padded.loss.item() == pytest.approx(in_one_row.loss.item(), rel=1e-5)
    torch.testing.assert_close(in_one_row.logits[0, 20:], padded.logits[2, :10], rtol=1e-4, atol=1e-5)
    assert (seeing.logits[0, 20:] - padded.logits[2, :10]).abs().max() > 0.1


@pytest.mark.parametrize("packing", [False, True])
def test_chats_longer_than_max_length_are_left_out(tmp_path, tokenizer, caplog, packing):
    file = write_data(tmp_path, "prompt_answer")  # of 7 to 11 tokens
    args = DataArguments([file], max_length=9, packing=packing)
    examples = load_examples([file], tokenizer, args, quiet=True)
    assert sorted(len(s["input_ids"]) for row in examples for s in row) == [7, 7, 7, 8, 8, 8, 9, 9]
    assert "4 of 12 chats exceed max_length 9" in caplog.text and "max_length 11 takes all" in caplog.text
    args.max_length = 5
    with pytest.raises(ValueError, match=r"every sequence exceeds max_length 5.* longest has 11 tokens"):
        load_examples([file], tokenizer, args, quiet=True)


def test_prompts_of_documents_are_not_cut_by_length(tmp_path, tokenizer):
    """Those that fit would not ask for every place equally often."""
    rng, file = random.Random(0), str(tmp_path / "documents")
    Path(file).write_text("\n".join(words(rng, rng.randint(7, 20)) + " ." for _ in range(60)))
    args = DataArguments([file], data_format="documents", documents_per_prompt=4, passage_words=16, prompts=20)
    lengths = [len(s["input_ids"]) for (s,) in load_examples([file], tokenizer, args, quiet=True)]
    args.max_length = max(lengths) - 1
    assert min(lengths) < args.max_length
    with pytest.raises(ValueError, match=rf"of 20 prompts exceed .* Raise max_length to {max(lengths)}"):
        load_examples([file], tokenizer, args, quiet=True)


def test_tables_and_text_without_spaces_make_no_passage_longer(tmp_path):
    rng, file = random.Random(0), tmp_path / "notes.md"
    parts = [words(rng, rng.randint(7, 15)) + " ." for _ in range(60)]
    for i, part in enumerate(("| w5 " * 300, "w5w6" * 300, "字" * 400)):
        parts.insert(20 * i + 5, part)
    parts.append(long := words(rng, 40) + " .")  # longer than a passage, and still a sentence
    file.write_text("\n\n".join(parts))
    args = DataArguments([str(file)], data_format="documents", documents_per_prompt=4, passage_words=16, prompts=40)
    shown = []
    for _, messages in document_chats([str(file)], args, seed=0):
        shown += re.findall(r"Document \d+: (.*)", FACT.sub("", messages[0]["content"]))
    shown = [passage.strip() for passage in shown]
    assert len(shown) == 160 and long in shown
    assert max(len(passage.split()) for passage in shown if passage != long) <= 20


@pytest.mark.parametrize(("documents", "questions"), [(5, 1), (5, 4), (5, 15), (30, 3)])
def test_every_fact_is_asked_for_equally_often(tmp_path, documents, questions):
    file = write_data(tmp_path, "documents")
    num_facts = documents * min(3, 67 // documents)
    args = DataArguments(
        [file],
        data_format="documents",
        documents_per_prompt=documents,
        questions=questions,
        prompts=2 * num_facts,
        passage_words=8,
    )
    asked = [0] * num_facts
    for _, messages in document_chats([file], args, seed=0):
        shown = re.findall(r"Document \d+: (.*)", messages[0]["content"])
        per_document = [FACT.findall(passage) for passage in shown]
        assert [len(facts) for facts in per_document] == [num_facts // documents] * documents
        facts = {name: (place, code) for place, (name, code) in enumerate(itertools.chain(*per_document))}
        assert len(facts) == num_facts and len(messages) == 2 * questions
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            name = re.search(r"What is the access code of (\w+)\?$", question["content"])[1]
            place, code = facts[name]
            assert answer["content"] == f"The access code of {name} is {code}."
            asked[place] += 1
    assert asked == [2 * questions] * num_facts


def test_hidden_facts_are_none_of_those_that_are_measured(tmp_path):
    args = DataArguments([file := write_data(tmp_path, "documents")], documents_per_prompt=4, passage_words=16)
    hidden = {fact for _, messages in document_chats([file], args, seed=0) for fact in FACT.findall(str(messages))}
    measured = {fact for seed in range(50) for fact in FACT.findall(str(sample_facts(30, random.Random(seed))))}
    for of_training, of_evaluation in zip(zip(*hidden, strict=True), zip(*measured, strict=True), strict=True):
        assert len(set(of_evaluation)) >= 30 and not set(of_training) & set(of_evaluation)
