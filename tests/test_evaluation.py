import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from byte_models import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from families import tiny_model
from peft import PromptTuningConfig, get_peft_model
from tokenizers import processors

from peft_moice import MoICEConfig
from peft_moice.evaluation import (
    Example,
    Facts,
    PositionLosses,
    Result,
    Score,
    bootstrap_interval,
    encode_chat,
    evaluate,
    losses_by_position,
    perplexity,
    sample_facts,
    wilson_interval,
)
from peft_moice.evaluation.grid import contained, encode_example
from peft_moice.evaluation.reader import Reader


class TestWilsonInterval:
    @pytest.mark.parametrize("trials", [1, 10, 99])
    def test_closed_forms_at_the_ends(self, trials):
        squared = 1.959963984540054**2
        assert wilson_interval(trials, trials) == (pytest.approx(trials / (trials + squared)), 1)
        assert wilson_interval(0, trials) == (0, pytest.approx(squared / (trials + squared)))

    def test_covers_exactly_the_proportions_that_the_score_test_accepts(self):
        lower, upper = wilson_interval(7, 20)
        for bound in (lower, upper):
            assert abs(7 / 20 - bound) / math.sqrt(bound * (1 - bound) / 20) == pytest.approx(1.959963984540054)

    @pytest.mark.parametrize("arguments", [(1, 0), (-1, 3), (4, 3), (1, 3, 0.0), (1, 3, 1.0)])
    def test_refuses_impossible_values(self, arguments):
        with pytest.raises(ValueError):
            wilson_interval(*arguments)


class TestFacts:
    def test_splits_have_no_name_and_no_code_in_common(self):
        rng = random.Random(0)
        seen = {
            split: [sample_facts(60, rng, split) for _ in range(200)]  # 12,000 of the 90,000 codes each
            for split in ("train", "eval")
        }
        assert all(len(facts) == len(set(facts.names)) == len(set(facts.codes)) == 60 for facts in seen["eval"])
        for attribute in ("names", "codes"):
            train, evaluation = (
                {value for facts in seen[split] for value in getattr(facts, attribute)} for split in ("train", "eval")
            )
            assert train and evaluation and not train & evaluation

    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_digits_do_not_tell_the_split(self, split):
        rng = random.Random(0)
        codes = [code for _ in range(20) for code in sample_facts(60, rng, split).codes]
        assert all(len(code) == 5 for code in codes)
        assert {code[-1] for code in codes} == set("0123456789")

    @pytest.mark.parametrize(
        ("arguments", "named"), [((0,), "num_facts"), ((1000,), "num_facts"), ((3, "test"), "split")]
    )
    def test_refuses_bad_values(self, arguments, named):
        with pytest.raises(ValueError, match=named):
            sample_facts(arguments[0], random.Random(0), *arguments[1:])


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_encoded_chats_mark_the_codes_behind_all_facts_and_their_questions(chat_template):
    tokenizer, facts = byte_tokenizer(chat_template), sample_facts(6, random.Random(0))
    chat = encode_chat(tokenizer, facts, [4, 0, 4])
    answers = [token for token, is_answer in zip(chat.input_ids, chat.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(answers) == facts.codes[4] + facts.codes[0] + facts.codes[4]
    before = tokenizer.decode(chat.input_ids[: chat.is_answer.index(True)])
    assert before.endswith(f"The access code of {facts.names[4]} is ")
    assert before.index(str(facts)) < before.index(f"What is the access code of {facts.names[4]}?")
    with pytest.raises(ValueError, match="asked"):
        encode_chat(tokenizer, facts, [])
    with pytest.raises(ValueError, match="fast tokenizer"):
        encode_chat(SimpleNamespace(is_fast=False), facts, [0])


@pytest.fixture(scope="module")
def knows_some():
    """A model that has learned by heart the facts at the first, the middle and the last position of one list."""
    model, tokenizer = tiny_llama(), byte_tokenizer(CHAT_TEMPLATE)
    facts = sample_facts(5, random.Random("7 5"))  # as `evaluate` draws them
    chats = [encode_chat(tokenizer, facts, [index]) for index in (0, 2, 4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # How many steps it takes depends on the processor's rounding.
    for _ in range(300):
        losses = []
        for chat in chats:
            labels = torch.tensor(chat.input_ids).masked_fill(~torch.tensor(chat.is_answer), -100)
            losses.append(model(input_ids=torch.tensor([chat.input_ids]), labels=labels[None]).loss)
        if max(losses) < 0.02:
            return model, tokenizer, facts
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    pytest.fail(f"The model has not learned the facts: {losses}")


def model_that_reads(kind: str):
    """Plain, adapted, with sliding windows shorter than what is read, or with a prompt of its own."""
    if kind == "sliding":
        return tiny_model("gemma3_text", vocab_size=256)
    if kind == "prompt":
        return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    config = MoICEConfig(base_multipliers=[1.0, 0.25], init_weights=False)
    return (get_peft_model(tiny_llama(), config) if kind == "adapted" else tiny_llama()).eval()


class TestPerplexity:
    TEXT = "".join(random.Random(0).choices("abcdefgh ", k=700))

    def test_of_a_uniform_model_is_its_vocabulary(self):
        model = tiny_llama()
        torch.nn.init.zeros_(model.lm_head.weight)
        assert perplexity(model, byte_tokenizer(), self.TEXT, chunk_length=64) == pytest.approx(256, rel=1e-5)

    def test_is_the_exponential_of_the_models_own_loss(self):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        chunks = torch.tensor(tokenizer(self.TEXT)["input_ids"])[:600].view(3, 200)  # the last 100 do not fill a chunk
        loss = model(input_ids=chunks, labels=chunks).loss
        assert perplexity(model, tokenizer, self.TEXT, chunk_length=200) == pytest.approx(loss.exp().item(), rel=1e-5)
        loss = model(input_ids=chunks[:1], labels=chunks[:1]).loss
        measured = perplexity(model, tokenizer, self.TEXT, chunk_length=200, max_chunks=1)
        assert measured == pytest.approx(loss.exp().item(), rel=1e-5)

    def test_refuses_bad_values(self):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        with pytest.raises(ValueError, match="700 tokens, fewer than a chunk of 701"):
            perplexity(model, tokenizer, self.TEXT, chunk_length=701)
        with pytest.raises(ValueError, match="chunk_length"):
            perplexity(model, tokenizer, self.TEXT, chunk_length=1)
        with pytest.raises(ValueError, match="max_chunks"):
            perplexity(model, tokenizer, self.TEXT, max_chunks=0)

    def test_a_mean_is_of_whole_buckets(self):
        losses = PositionLosses(edges=(11, 31), losses=(1.0, 4.0), chunks=1)
        assert losses.mean() == 3.0 and losses.mean(end=20) == 1.0 and losses.mean(11) == 4.0
        with pytest.raises(ValueError, match="between positions 12 and 20"):
            losses.mean(12, 20)


class TestBootstrapInterval:
    def test_of_equal_values_is_a_point(self):
        assert bootstrap_interval([[0.5], [0.5, 0.5]]) == (0.5, 0.5)

    @pytest.mark.slow
    def test_covers_the_mean_about_as_often_as_it_says(self):
        rng = random.Random(0)
        covered = 0
        for _ in range(200):
            low, high = bootstrap_interval([[rng.random()] for _ in range(40)], 0.8, resamples=200)
            covered += low <= 0.5 <= high
        assert 0.7 < covered / 200 < 0.9

    def test_draws_whole_groups(self):
        """Forty values of which ten at a time are equal tell as little as four."""
        rng = random.Random(0)
        values = [rng.random() for _ in range(4)]
        together = bootstrap_interval([[value] * 10 for value in values])
        assert together == pytest.approx(bootstrap_interval([[value] for value in values]))
        apart = bootstrap_interval([[value] for value in values for _ in range(10)])
        assert apart[1] - apart[0] < 0.6 * (together[1] - together[0])

    @pytest.mark.parametrize("arguments", [([],), ([[]],), ([[1.0]], 1.0)])
    def test_refuses_impossible_values(self, arguments):
        with pytest.raises(ValueError):
            bootstrap_interval(*arguments)


@pytest.mark.parametrize("kind", ["plain", "adapted", "sliding", "prompt"])
def test_reader_gives_the_logits_of_whole_sequences(kind):
    model = model_that_reads(kind)
    rng = random.Random(0)
    begin = [rng.randrange(256) for _ in range(30)]
    reader = Reader(model)
    with torch.no_grad():
        # Going on, going back, going back to the middle of a continuation, an equal sequence, and a new beginning.
        sequences = [begin, [*begin, 5, 6, 7], [*begin[:12], 9, 9, 9], [*begin[:12], 9, 8], [*begin[:12], 9, 8]]
        sequences.append([1, 2, 3])
        for ids in sequences:
            expected = model(input_ids=torch.tensor([ids])).logits[0, -2:]
            torch.testing.assert_close(reader.logits(ids, len(ids) - 1), expected, rtol=1e-4, atol=1e-5)


def test_reader_reads_a_common_beginning_once():
    model, read = tiny_llama().eval(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    reader = Reader(model)
    with torch.no_grad():
        for end in ([1, 2], [3, 4, 5]):
            reader.logits([*range(100, 140), *end], 40)
    assert read == [42, 4]  # the last common token is read anew: it predicts the first that differs


def test_reader_writes_what_greedy_decoding_does():
    model = tiny_llama().eval()
    ids = list(range(40, 60))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    with torch.no_grad():
        assert Reader(model).write(ids, 8, set()) == expected
        assert Reader(model).write(ids, 8, {expected[3]}) == expected[: expected.index(expected[3])]
        assert Reader(model).write(ids, 8, set(), lambda written: len(written) == 3) == expected[:3]


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("opening", ["", "It is ", 'It is "'])
def test_encoded_answers_start_where_the_model_goes_on(chat_template, opening):
    tokenizer = byte_tokenizer(chat_template)
    ids, start = encode_example(tokenizer, Example("Which?", ("42",), 0.0, 1, opening), "42")
    answer = tokenizer.decode(ids[start:])
    assert answer.strip() == "42"
    assert tokenizer.decode(ids).endswith(f"{opening}42")
    assert ("<assistant>" in tokenizer.decode(ids)) == (chat_template is not None)


def test_an_end_that_the_tokenizer_puts_behind_the_text_is_no_answer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    assert tokenizer("42")["input_ids"][-1] == tokenizer.eos_token_id
    ids, start = encode_example(tokenizer, Example("Which?", ("42",), 0.0, 1), "42")
    assert tokenizer.decode(ids[start:]) == "42"


class TestEvaluate:
    @pytest.mark.slow
    @pytest.mark.parametrize("scoring", ["exact", "any", "all"])
    def test_counts_what_greedy_decoding_answers(self, knows_some, scoring, monkeypatch):
        model, tokenizer, facts = knows_some
        monkeypatch.setattr(Facts, "scoring", scoring)
        result = evaluate(model, tokenizer, Facts(), lengths=[5], num_groups=1, seed=7, max_new_tokens=6)
        expected = []
        for index, code in enumerate(facts.codes):
            chat = encode_chat(tokenizer, facts, [index])
            prompt = torch.tensor([chat.input_ids[: chat.is_answer.index(True)]])
            written = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
            expected.append(float(tokenizer.decode(written) == code))
        assert result.table() == [expected] == [[1.0, 0.0, 1.0, 0.0, 1.0]]
        assert (result.gap(), result.gap(5)) == (1.0, 1.0)
        losses = [result.mean("loss", position=position) for position in result.positions]
        assert max(losses[::2]) < min(losses[1::2])

    def test_a_batch_size_is_said_to_have_no_effect(self):
        with pytest.warns(FutureWarning, match="`batch_size` has no effect"):
            evaluate(tiny_llama(), byte_tokenizer(), Facts(), lengths=[2], num_groups=1, batch_size=2)

    def test_nothing_is_asked_twice_and_the_model_stays_in_its_mode(self):
        class Two:
            name, unit, scoring = "two", "words", "exact"

            def draw(self, rng, length, positions):
                word = rng.choice("ab")
                return [Example(f"Say {word}.", (word,), position, length) for position in positions]

        for mode in (True, False):
            model = tiny_llama().train(mode)
            result = evaluate(model, byte_tokenizer(), Two(), lengths=[1, 2], positions=[0.0, 1.0], num_groups=20)
            assert len(result.scores) == 2 * 2 * 2
            assert model.training is mode

    def test_refuses_bad_values(self):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        sizes = ({name: 0} for name in ("num_groups", "max_new_tokens"))
        for wrong in (*sizes, {"lengths": []}, {"lengths": [0]}, {"positions": (2.0,)}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                evaluate(model, tokenizer, Facts(), **{"lengths": [3], **wrong})


@pytest.mark.parametrize(
    ("scoring", "answers", "written", "score"),
    [
        ("any", ["42", "forty two"], "It is Forty-Two", 0.0),  # SQuAD's metric joins what a hyphen parts
        ("any", ["42", "fortytwo"], "It is Forty-Two", 1.0),
        ("any", ["The Who"], "by who?", 1.0),
        ("any", ["Paris"], "Lyon\nParis", 0.0),  # else copying the prompt would do
        ("any", ["The", "Paris"], "Lyon", 0.0),  # an answer of nothing but articles is in no text
        ("all", ["123", "456"], "456 and 78", 0.5),
        ("all", ["ABC", "123"], "abc,\n123", 1.0),
        ("all", ["12345"], "12,345", 0.0),
    ],
)
def test_written_answers_are_scored_as_the_papers_do(scoring, answers, written, score):
    assert contained(scoring, answers, written) == score


class TestResult:
    RESULT = Result(
        "facts",
        "facts",
        "model",
        0,
        tuple(
            Score(group, length, position, float(position != 0.5 or group == 0), 0.1 * group, 0.5)
            for length in (30, 45)
            for group in range(4)
            for position in (0.0, 0.5, 1.0)
        ),
    )

    def test_means_and_intervals_of_a_cell(self):
        assert self.RESULT.table() == [[1.0, 0.25, 1.0]] * 2
        assert self.RESULT.mean("loss") == pytest.approx(0.15)
        assert self.RESULT.interval(length=30, position=0.5) == wilson_interval(1, 4)

    def test_means_over_positions_draw_whole_groups(self):
        groups = [[1.0, 1.0, 1.0], *[[1.0, 0.0, 1.0]] * 3] * 2
        assert self.RESULT.interval() == bootstrap_interval(groups)

    def test_intervals_have_a_width_where_there_is_little_to_go_by(self):
        def result(scores):
            return Result("t", "u", "m", 0, tuple(Score(g, 30, p, s, s, s) for g, p, s in scores))

        one_draw = result([(0, 0.0, 1.0), (0, 0.5, 0.0), (0, 1.0, 0.0)])
        assert one_draw.interval() == wilson_interval(1, 3)
        assert one_draw.interval("loss") == bootstrap_interval([[1.0], [0.0], [0.0]])
        all_right = result([(g, p, 1.0) for g in range(4) for p in (0.0, 0.5, 1.0)])
        assert all_right.interval() == wilson_interval(4, 4)
        all_alike = result([(g, p, s) for g in range(4) for p, s in ((0.0, 1.0), (0.5, 0.0), (0.6, 0.0), (1.0, 0.0))])
        assert all_alike.interval() == wilson_interval(1, 4)
        halves = result([(g, 0.0, 0.25) for g in range(4)])  # the share of several answers
        assert halves.interval() == wilson_interval(1, 4)
        assert halves.interval("loss") == (0.25, 0.25)

    def test_survives_the_disk(self, tmp_path):
        self.RESULT.save(tmp_path / "result.json")
        assert Result.load(tmp_path / "result.json") == self.RESULT
        cells = json.loads((tmp_path / "result.json").read_text())["cells"]
        assert [cell["score"] for cell in cells] == [1.0, 0.25, 1.0] * 2

    @pytest.mark.slow
    def test_draws_itself(self):
        heat_map = self.RESULT.plot()
        assert heat_map.axes[0].images[0].get_array().tolist() == self.RESULT.table()
        other = dataclasses.replace(self.RESULT, model="other")
        curves = self.RESULT.plot([other])
        assert [len(axis.containers) for axis in curves.axes] == [2, 2]

    def test_refuses_curves_that_would_hide_each_other_or_stand_elsewhere(self):
        with pytest.raises(ValueError, match=r"\['model', 'model'\].* Give `evaluate` a `name`"):
            self.RESULT.plot([self.RESULT])
        scores = tuple(
            Score(0, length, position, 1.0, 0.1, 1.0) for length in (30, 45) for position in (0.0, 0.25, 1.0)
        )
        with pytest.raises(ValueError, match=r"there are .* the positions \[0.0, 0.25, 1.0\]"):
            self.RESULT.plot([dataclasses.replace(self.RESULT, model="other", scores=scores)])

    def test_names_what_there_is(self):
        with pytest.raises(ValueError, match=r"lengths \[30, 45\]"):
            self.RESULT.mean(length=31)


def test_losses_by_position_are_means_of_their_own_tokens():
    model, tokenizer = tiny_llama().eval(), byte_tokenizer()
    text = "".join(random.Random(0).choices("abcdefgh ", k=40))
    result = losses_by_position(model, tokenizer, text, chunk_length=20)
    ids = torch.tensor(tokenizer(text)["input_ids"]).view(2, 20)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(dim=0)
    expected = [losses[a - 1 : b - 1].mean().item() for a, b in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 20))]
    assert result.edges == (2, 4, 8, 16, 20) and result.chunks == 2
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert result.centers == (1.0, 2.5, 5.5, 11.5, 17.5)
    assert result.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
