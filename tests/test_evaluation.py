import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_moice.evaluation import encode_chat, perplexity, position_sweep, sample_facts, wilson_interval

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


def byte_tokenizer(chat_template=None):
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config)


def answers_of(tokenizer, chat):
    ids = [token for token, is_answer in zip(chat.input_ids, chat.is_answer, strict=True) if is_answer]
    return tokenizer.decode(ids)


class TestWilsonInterval:
    def test_closed_forms_at_the_ends(self):
        squared = 1.959963984540054**2
        assert wilson_interval(10, 10) == pytest.approx((10 / (10 + squared), 1.0))
        assert wilson_interval(0, 10) == pytest.approx((0.0, squared / (10 + squared)))

    def test_covers_exactly_the_proportions_that_the_score_test_accepts(self):
        lower, upper = wilson_interval(7, 20)
        for bound in (lower, upper):
            assert abs(7 / 20 - bound) / math.sqrt(bound * (1 - bound) / 20) == pytest.approx(1.959963984540054)

    def test_more_confidence_is_wider_and_more_trials_are_narrower(self):
        lower, upper = wilson_interval(7, 20)
        assert wilson_interval(7, 20, 0.99)[0] < lower < wilson_interval(70, 200)[0]
        assert wilson_interval(70, 200)[1] < upper < wilson_interval(7, 20, 0.99)[1]

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

    def test_names_and_codes_of_a_list_are_distinct(self):
        facts = sample_facts(60, random.Random(0))
        assert len(facts) == len(set(facts.names)) == len(set(facts.codes)) == 60

    def test_refuses_bad_values(self):
        with pytest.raises(ValueError, match="num_facts"):
            sample_facts(0, random.Random(0))
        with pytest.raises(ValueError, match="num_facts"):
            sample_facts(1000, random.Random(0))
        with pytest.raises(ValueError, match="split"):
            sample_facts(3, random.Random(0), split="test")


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
class TestEncodeChat:
    def test_marks_the_codes_that_are_asked_for(self, chat_template):
        tokenizer, facts = byte_tokenizer(chat_template), sample_facts(6, random.Random(0))
        chat = encode_chat(tokenizer, facts, [4, 0, 4])
        assert answers_of(tokenizer, chat) == facts.codes[4] + facts.codes[0] + facts.codes[4]

    def test_the_answer_follows_its_question_after_all_facts(self, chat_template):
        tokenizer, facts = byte_tokenizer(chat_template), sample_facts(3, random.Random(0))
        chat = encode_chat(tokenizer, facts, [1])
        before = tokenizer.decode(chat.input_ids[: chat.is_answer.index(True)])
        assert before.endswith(f"The access code of {facts.names[1]} is ")
        assert before.index(str(facts)) < before.index(f"What is the access code of {facts.names[1]}?")

    def test_chats_about_the_same_facts_begin_alike(self, chat_template):
        tokenizer, facts = byte_tokenizer(chat_template), sample_facts(5, random.Random(0))
        first, second = (encode_chat(tokenizer, facts, [index]).input_ids for index in (0, 4))
        shared = tokenizer.decode(
            first[: next(i for i, pair in enumerate(zip(first, second, strict=False)) if len(set(pair)) > 1)]
        )
        assert str(facts) in shared

    def test_refuses_to_ask_nothing(self, chat_template):
        with pytest.raises(ValueError, match="asked"):
            encode_chat(byte_tokenizer(chat_template), sample_facts(3, random.Random(0)), [])


def test_refuses_a_tokenizer_without_character_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        encode_chat(Slow(), sample_facts(3, random.Random(0)), [0])


@pytest.fixture(scope="module")
def knows_some():
    """A model that has learned by heart the facts at the first, the middle and the last position of one list."""
    model, tokenizer = tiny_llama(), byte_tokenizer(CHAT_TEMPLATE)
    facts = sample_facts(5, random.Random(7))
    chats = [encode_chat(tokenizer, facts, [index]) for index in (0, 2, 4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = 0.0
        for chat in chats:
            labels = torch.tensor(chat.input_ids).masked_fill(~torch.tensor(chat.is_answer), -100)
            loss = loss + model(input_ids=torch.tensor([chat.input_ids]), labels=labels[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, tokenizer, facts


class TestPositionSweep:
    def test_counts_what_greedy_decoding_answers(self, knows_some):
        model, tokenizer, facts = knows_some
        sweep = position_sweep(model, tokenizer, num_facts=5, num_lists=1, seed=7)
        expected = []
        for index, code in enumerate(facts.codes):
            chat = encode_chat(tokenizer, facts, [index])
            prompt = torch.tensor([chat.input_ids[: chat.is_answer.index(True)]])
            written = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
            expected.append(int(tokenizer.decode(written) == code))
        assert sweep.correct == tuple(expected) == (1, 0, 1, 0, 1)
        assert sweep.accuracy == (1.0, 0.0, 1.0, 0.0, 1.0)
        assert sweep.gap == 1.0
        assert sweep.intervals() == [wilson_interval(count, 1) for count in expected]

    def test_asks_at_the_given_positions(self, knows_some):
        model, tokenizer, _ = knows_some
        sweep = position_sweep(model, tokenizer, num_facts=5, num_lists=1, positions=(1.0, 0.75), seed=7)
        assert sweep.positions == (1.0, 0.75) and sweep.correct == (1, 0)

    def test_other_seeds_ask_other_questions(self, knows_some):
        model, tokenizer, _ = knows_some
        assert position_sweep(model, tokenizer, num_facts=5, num_lists=2, seed=8).correct == (0,) * 5

    def test_leaves_the_model_in_its_mode(self, knows_some):
        model, tokenizer, _ = knows_some
        for mode in (True, False):
            model.train(mode)
            position_sweep(model, tokenizer, num_facts=2, num_lists=1)
            assert model.training is mode

    def test_to_dict_is_plain_numbers(self, knows_some):
        model, tokenizer, _ = knows_some
        result = position_sweep(model, tokenizer, num_facts=5, num_lists=1, seed=7).to_dict()
        assert result["correct"] == (1, 0, 1, 0, 1) and result["trials"] == 1 and result["num_facts"] == 5
        assert result["intervals"][1] == wilson_interval(0, 1)

    def test_refuses_bad_values(self):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        with pytest.raises(ValueError, match="num_lists"):
            position_sweep(model, tokenizer, num_lists=0)
        with pytest.raises(ValueError, match="positions"):
            position_sweep(model, tokenizer, positions=(0.0, 1.5))
        with pytest.raises(ValueError, match="positions"):
            position_sweep(model, tokenizer, positions=())


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
        with pytest.raises(ValueError, match="700 tokens, fewer than one chunk of 701"):
            perplexity(model, tokenizer, self.TEXT, chunk_length=701)
        with pytest.raises(ValueError, match="chunk_length"):
            perplexity(model, tokenizer, self.TEXT, chunk_length=1)
        with pytest.raises(ValueError, match="max_chunks"):
            perplexity(model, tokenizer, self.TEXT, max_chunks=0)
