"""The training examples on tiny models: data, presets, resuming, what is left on disk."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import VOCABULARY, decide, load, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moice import MoICEConfig
from peft_moice.angles import search_angles
from peft_moice.built_in import BuiltInRouters
from peft_moice.config import RELEASED_MULTIPLIERS
from peft_moice.evaluation import Result
from peft_moice.pretraining import add_routers

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import choose_angles  # noqa: E402
import evaluate as evaluate_example  # noqa: E402
import router_data  # noqa: E402
import train_from_scratch  # noqa: E402
import train_router  # noqa: E402
from router_data import Collator, DataArguments  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ 'w2 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} w4 {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}w3 {% endif %}"
FORMATS = ("messages", "prompt_answer", "text", "documents")


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(5, VOCABULARY)}" for _ in range(count))


def write_data(folder: Path, data_format: str, seed: int = 0) -> str:
    """A file of 12 chats, or of 40 sentences of 8 words."""
    rng = random.Random(seed)
    file = folder / f"{data_format}{seed}"
    if data_format in ("text", "documents"):
        file.write_text("\n".join(words(rng, 8) + " ." for _ in range(40)))
        return str(file)
    pairs = [(words(rng, 4 + index % 5), words(rng, 3)) for index in range(12)]
    if data_format == "prompt_answer":
        records = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    else:
        turns = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w10 w11"}]
        records = [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}, *turns]}
            for p, a in pairs
        ]
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def arguments(model: str, output_dir: Path, *files: str, **options) -> list[str]:
    """Command-line arguments. Options that are None are left out."""
    defaults = {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 2, "save_strategy": "no"}
    options = {**defaults, "max_length": 256, "documents_per_prompt": 4, "passage_words": 16, "prompts": 20, **options}
    argv = ["--model", model, "--output_dir", str(output_dir), "--train_files", *files]
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def run(argv: list[str]) -> None:
    train_router.main(*train_router.parse_arguments(argv))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("with_template", [False, True])
@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format_trains_and_leaves_an_adapter_with_a_card(model, tmp_path, data_format, with_template):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    file, held_out = write_data(tmp_path, data_format), write_data(tmp_path, data_format, seed=1)
    options = {"chat_template": template} if with_template else {}
    folder = tmp_path / "out"
    run(arguments(model, folder, file, eval_files=held_out, data_format=data_format, learning_rate=0.1, **options))

    card = (folder / "README.md").read_text()
    assert "import peft_moice" in card
    assert f"| Data | {data_format}: {Path(file).name} |" in card
    assert "| Steps | 2 |" in card
    base, moice = (float(re.search(rf"\| {name} \| ([\d.]+) \|", card)[1]) for name in ("base", "MoICE"))
    assert base != moice
    trained = AutoPeftModelForCausalLM.from_pretrained(folder)
    # normal(0, 0.02) at the start; AdamW moves a weight by about the learning rate in a step.
    assert all(weight.abs().max() > 0.1 for name, weight in trained.named_parameters() if "moice_router" in name)


def test_labels_are_the_answers_and_the_end_of_their_turns(tokenizer):
    messages = [
        {"role": "user", "content": "w10 w11"},
        {"role": "assistant", "content": "w12"},
        {"role": "user", "content": "w13"},
        {"role": "assistant", "content": "w14 w15"},
    ]
    with_template = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    with_template.chat_template = TEMPLATE
    encoded = router_data.encode_chat("here", messages, with_template, "answers")
    assert encoded["input_ids"] == [2, 10, 11, 4, 3, 12, 4, 2, 13, 4, 3, 14, 15, 4]
    assert encoded["labels"] == [*[-100] * 5, 12, 4, *[-100] * 4, 14, 15, 4]
    assert router_data.encode_chat("here", messages, with_template, "all")["labels"] == encoded["input_ids"]

    encoded = router_data.encode_chat("here", messages, tokenizer, "answers")
    assert encoded["input_ids"] == [10, 11, 12, 13, 14, 15]
    assert encoded["labels"] == [-100, -100, 12, -100, 14, 15]


def test_a_template_that_rewrites_earlier_answers_is_refused(tokenizer):
    rewriting = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }} {% endfor %}"
    )
    turn = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w11"}]
    with pytest.raises(ValueError, match=r"data.jsonl, line 3: the chat template writes message 1 differently"):
        router_data.encode_chat("data.jsonl, line 3", turn * 2, rewriting, "answers")


def test_packed_chats_do_not_see_each_other(model, tokenizer):
    rng = random.Random(0)
    chats = [
        [{"role": "user", "content": words(rng, n)}, {"role": "assistant", "content": words(rng, 4)}]
        for n in (3, 9, 6)
    ]
    sequences = [router_data.encode_chat("here", chat, tokenizer, "answers") for chat in chats]
    packed = router_data.pack(sequences, max_length=23)
    assert [[len(sequence["input_ids"]) for sequence in row] for row in packed] == [[7, 13], [10]]

    collate = Collator(tokenizer)
    adapted = add_routers(load(model), wide_config(router_aux_loss_coef=0.0)).eval()
    with torch.no_grad():
        padded = adapted(**collate([[sequence] for sequence in sequences]), use_cache=False)
        in_one_row = adapted(**collate([sequences]), use_cache=False)
        seeing = adapted(input_ids=collate([sequences])["input_ids"], use_cache=False)
    assert padded.loss.item() == pytest.approx(in_one_row.loss.item(), rel=1e-5)
    torch.testing.assert_close(in_one_row.logits[0, 20:], padded.logits[2, :10], rtol=1e-4, atol=1e-5)
    assert (seeing.logits[0, 20:] - padded.logits[2, :10]).abs().max() > 0.1


@pytest.mark.parametrize("packing", [False, True])
def test_chats_longer_than_max_length_are_left_out(tmp_path, tokenizer, packing):
    file = write_data(tmp_path, "prompt_answer")  # of 7 to 11 tokens
    examples = router_data.load_examples(
        [file], tokenizer, DataArguments([file], data_format="prompt_answer", max_length=9, packing=packing), 0, True
    )
    assert sorted(len(s["input_ids"]) for row in examples for s in row) == [7, 7, 7, 8, 8, 8, 9, 9]


def test_long_chats_name_the_length_that_takes_all(tmp_path, tokenizer, caplog):
    file = write_data(tmp_path, "prompt_answer")  # of 7 to 11 tokens
    args = DataArguments([file], data_format="prompt_answer", max_length=9)
    router_data.load_examples([file], tokenizer, args, 0, True)
    assert "4 of 12 chats exceed --max_length 9" in caplog.text and "--max_length 11 takes all" in caplog.text
    args.max_length = 5
    with pytest.raises(ValueError, match=r"every sequence exceeds --max_length 5.* longest has 11 tokens"):
        router_data.load_examples([file], tokenizer, args, 0, True)


def test_prompts_of_documents_are_not_cut_by_length(tmp_path, tokenizer):
    """Those that fit would not ask for every place equally often."""
    rng, file = random.Random(0), str(tmp_path / "documents")
    Path(file).write_text("\n".join(words(rng, rng.randint(7, 20)) + " ." for _ in range(60)))
    args = DataArguments([file], data_format="documents", documents_per_prompt=4, passage_words=16, prompts=20)
    lengths = [len(s["input_ids"]) for (s,) in router_data.load_examples([file], tokenizer, args, 0, True)]
    args.max_length = max(lengths) - 1
    assert min(lengths) < args.max_length
    with pytest.raises(ValueError, match=rf"of 20 prompts exceed .* Raise --max_length to {max(lengths)}"):
        router_data.load_examples([file], tokenizer, args, 0, True)


@pytest.mark.parametrize("content", [None, "", "[]"])
def test_data_is_checked_before_the_model_is_loaded(model, tmp_path, content):
    """The folder has a tokenizer and no weights."""
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        run(arguments(str(folder), tmp_path / "out", str(file)))


@pytest.mark.parametrize("questions", [1, 2, 3])
def test_every_place_is_asked_for_equally_often(tmp_path, questions):
    file = write_data(tmp_path, "documents")
    args = DataArguments(
        [file], data_format="documents", documents_per_prompt=5, questions=questions, prompts=20, passage_words=16
    )
    asked = [0] * 5
    for _, messages in router_data.document_chats([file], args, seed=0):
        shown = re.findall(r"Document \d+: (.*)", messages[0]["content"])
        assert len(messages) == 2 * questions
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            start = re.search(r'starts with "(.*)"', question["content"])[1]
            assert answer["content"].startswith(start)
            (place,) = [i for i, passage in enumerate(shown) if answer["content"] in passage]
            assert "".join(shown).count(start) == 1
            asked[place] += 1
    assert asked == [20 * questions // 5] * 5


class TestPresets:
    def test_paper(self, model, tmp_path):
        file = write_data(tmp_path, "messages")
        args, data_args, training_args = train_router.parse_arguments(
            ["--preset", "paper", "--model", model, "--train_files", file, "--output_dir", str(tmp_path), "--use_cpu"]
        )
        assert (training_args.max_steps, training_args.learning_rate, training_args.weight_decay) == (7, 1e-4, 0.0)
        assert training_args.train_batch_size * training_args.gradient_accumulation_steps == 128
        assert training_args.lr_scheduler_type == "constant"
        assert training_args.bf16 and training_args.gradient_checkpointing
        assert (data_args.loss_on, data_args.max_length) == ("all", 4608)
        assert (args.aux_coef, args.dtype, args.angles, args.top_k) == (0.3, "bfloat16", None, None)

    def test_paper_reaches_the_adapter(self, model, tmp_path):
        file, folder = write_data(tmp_path, "messages"), tmp_path / "out"
        run(arguments(model, folder, file, preset="paper", max_steps=1, sequences_per_step=4, max_length=None))
        config = PeftConfig.from_pretrained(folder)
        assert config.rope_bases == [10_000 * multiple for multiple in RELEASED_MULTIPLIERS]
        assert (config.top_k, config.router_dim, config.router_aux_loss_coef) == (7, 7, 0.3)
        assert config.init_weights is True

    def test_retrieval_reaches_the_adapter(self, model, tmp_path):
        file, folder = write_data(tmp_path, "documents"), tmp_path / "out"
        run(arguments(model, folder, file, preset="retrieval", keep_tokens=32))
        config = PeftConfig.from_pretrained(folder)
        assert config.rope_bases == [10_000, 2_500, 5_000, 20_000, 40_000]
        assert (config.init_weights, config.router_aux_loss_coef) == ("identity", 0.0)
        scales = [weight for name, weight in adapter(folder).items() if "identity_scale" in name]
        assert scales and all(scale.abs().min() > 0 for scale in scales)

    def test_arguments_override(self, model, tmp_path):
        argv = arguments(
            model, tmp_path, "file", preset="paper", max_steps=3, bf16=False, loss_on="answers", dtype="auto"
        )
        args, data_args, training_args = train_router.parse_arguments(argv)
        assert (training_args.max_steps, training_args.bf16, data_args.loss_on, args.dtype) == (
            3,
            False,
            "answers",
            "auto",
        )

    @pytest.mark.parametrize("option", [{"gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 3}])
    def test_a_batch_that_cannot_be_made_is_refused(self, model, tmp_path, option):
        with pytest.raises(ValueError, match=r"sequences_per_step 128 has to be a multiple"):
            train_router.parse_arguments(arguments(model, tmp_path, "file", preset="paper", **option))


def test_resuming_ends_where_the_straight_run_does(model, tmp_path):
    file = write_data(tmp_path, "documents")
    options = {"preset": "retrieval", "keep_tokens": 32, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(arguments(model, straight, file, **options, resume_from_checkpoint="last"))  # there is none
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(arguments(model, resumed, file, **options, resume_from_checkpoint="last"))
    expected, actual = adapter(straight), adapter(resumed)
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name
    at_two = adapter(resumed / "checkpoint-2")
    assert not all(torch.equal(weight, at_two[name]) for name, weight in expected.items())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_distance_from_the_base_model_is_part_of_the_loss(model, tmp_path, steps):
    """As often as there are optimizer steps, however many micro-batches each of them has."""
    file = tmp_path / "text"
    file.write_text(words(random.Random(0), 33))
    argv = arguments(model, tmp_path / "out", str(file), data_format="text", keep_weight=2.0, keep_tokens=32)
    args, data_args, training_args = train_router.parse_arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(model)
    adapted = get_peft_model(load(model), wide_config(router_aux_loss_coef=0.0)).train()
    decide(adapted)
    adapted.get_output_embeddings().weight.data *= 20  # so that angles matter to the text
    trainer = train_router.RouterTrainer(
        arguments=args,
        data_arguments=data_args,
        keep_ids=train_router.ordinary_text(args, data_args, tokenizer),
        model=adapted,
        args=training_args,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = steps
    text = tokenizer(file.read_text(), return_tensors="pt").input_ids[:, :32]  # the only place for 32 of 33 tokens
    with torch.no_grad():
        log_probs = adapted(text).logits.log_softmax(-1)
        with adapted.disable_adapter():
            base = adapted(text).logits.log_softmax(-1)
    distance = (base.exp() * (base - log_probs)).sum(-1).mean()
    assert distance > 0.01
    ids = token_ids()
    num_items = torch.tensor(ids[:, 1:].numel() * steps)
    loss = trainer.compute_loss(adapted, {"input_ids": ids, "labels": ids}, num_items_in_batch=num_items)
    expected = (adapted(ids, labels=ids).loss + 2.0 * distance) / steps
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


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
        ("prompt_answer", b'"w5"\n', r"line 1: no 'prompt'"),
        ("prompt_answer", b'[{"prompt": "w5", "answer": "w6"}]\n', r"a JSON array, .* needs JSON lines"),
        ("messages", b'[\n  {"messages": []}\n]\n', r"a JSON array, .* needs JSON lines"),
        ("prompt_answer", b'{"prompt": "w5", "answer": "w6"}\n{"prompt"\n', r"line 2: not JSON"),
        ("prompt_answer", b'{"prompt": "w5", "answer": "w6"}\n\xff\n', r"line 2: not UTF-8"),
        ("prompt_answer", b"", r"is empty"),
        ("messages", b"\n \n", r"is empty"),
        ("text", b"", r"line 1: there is no text"),
        ("text", b"w5 w6\nw7 \xff", r"line 2: not UTF-8"),
        ("documents", b"w5 w6. w7 w8.", r"0 passages of 16 words with a sentence to ask for, too few"),
        ("documents", b"w5 w6 w7 w8 w9 w10.\n\n" * 40, r"passages repeat each other"),
    ],
)  # fmt: skip
def test_bad_files(tokenizer, tmp_path, data_format, content, message):
    file = tmp_path / "data"
    file.write_bytes(content)
    args = DataArguments([str(file)], data_format=data_format, documents_per_prompt=4, passage_words=16)
    with pytest.raises(ValueError, match=message) as raised:
        router_data.load_examples([str(file)], tokenizer, args, 0, True)
    assert str(file) in str(raised.value)


def test_keeping_near_the_base_needs_text(model, tmp_path):
    file = write_data(tmp_path, "messages")
    with pytest.raises(ValueError, match=r"needs more than 256 tokens of ordinary text, but no file gives 0"):
        run(arguments(model, tmp_path / "out", file, keep_weight=1.0))


@pytest.mark.slow
def test_two_processes_end_where_one_does(model, tmp_path):
    file = write_data(tmp_path, "messages")
    options = {"sequences_per_step": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "max_steps": 3}
    run(arguments(model, tmp_path / "one", file, **options))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [
            sys.executable,
            *launch,
            str(EXAMPLES / "train_router.py"),
            *arguments(model, tmp_path / "two", file, **options),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    expected, actual = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-3, atol=1e-5)


class TestAddRouters:
    def test_everything_learns_and_the_loss_has_the_balance_term(self, model):
        built = add_routers(load(model), wide_config(router_aux_loss_coef=0.5)).train()
        ids = token_ids()
        outputs = built(ids, labels=ids)
        built.eval()
        assert outputs.loss.item() == pytest.approx(built(ids, labels=ids).loss.item() + 0.5 * outputs.aux_loss.item())
        outputs.loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in built.parameters())

    def test_the_coefficient_survives_the_disk(self, model, tmp_path):
        built = add_routers(load(model), wide_config(router_aux_loss_coef=0.5)).train()
        built.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        ids = token_ids()
        expected, actual = built(ids, labels=ids), loaded(ids, labels=ids)
        assert actual.loss.item() == expected.loss.item()
        assert actual.aux_loss.item() == expected.aux_loss.item()

    def test_the_config_can_be_used_again(self, model):
        config = MoICEConfig(base_multipliers=[1.0, 2.0])
        add_routers(load(model), config)
        assert config.rope_bases is None and config.target_modules is None
        add_routers(AutoModelForCausalLM.from_pretrained(model), config)


def test_from_scratch_compares_like_with_like(tmp_path):
    args = train_from_scratch.Arguments(
        output_dir=str(tmp_path), hidden_size=64, layers=2, heads=2, length=64, steps=3, eval_windows=4, seeds=[0, 1]
    )
    threads = torch.get_num_threads()
    try:
        train_from_scratch.main(args)
    finally:
        torch.set_num_threads(threads)
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


def choose(folder: str, output_dir: Path, **options) -> None:
    options = {"context_length": 64, "num_experts": 3, "prompts": 2, "facts": 3, **options}
    choose_angles.main(choose_angles.Arguments(model=folder, output_dir=str(output_dir), **options))


class TestChooseAngles:
    def test_measures_and_searches(self, model, tmp_path, capsys):
        choose(model, tmp_path)
        printed = capsys.readouterr().out
        assert "over 16 rotated dimensions: [10000" in printed
        assert "By measurement, in the order of their use: [1.0, " in printed
        assert (tmp_path / "waveforms.png").is_file()

    def test_partial_rotary_counts_the_rotated_dimensions(self, tmp_path, capsys):
        folder = save_tiny_model(tmp_path / "model", "phi", max_position_embeddings=1024)
        choose(folder, tmp_path)
        expected = search_angles(8, 10_000.0, 64, 3)
        assert f"over 8 rotated dimensions: {expected}" in capsys.readouterr().out
        assert expected != search_angles(16, 10_000.0, 64, 3)

    def test_angles_by_layer_type_are_searched_one_by_one(self, tmp_path, capsys):
        folder = save_tiny_model(tmp_path / "model", "gemma3", max_position_embeddings=1024)
        choose(folder, tmp_path)
        printed = capsys.readouterr().out
        assert "in layers of type sliding_attention, over 16 rotated dimensions: [10000" in printed
        assert "in layers of type full_attention, over 16 rotated dimensions: [1000000" in printed
        assert "Nothing is measured" in printed
        assert (tmp_path / "waveforms_full_attention.png").is_file()

    def test_models_without_rotary_embeddings_are_refused_with_the_reason(self, tmp_path):
        folder = save_tiny_model(tmp_path / "model", "gpt2")
        with pytest.raises(ValueError, match="rotary"):
            choose(folder, tmp_path)


class TestEvaluateExample:
    @pytest.fixture(scope="class")
    def adapter_folder(self, model, tmp_path_factory) -> str:
        folder = tmp_path_factory.mktemp("adapter")
        adapted = get_peft_model(load(model), wide_config())
        decide(adapted)
        adapted.save_pretrained(folder)
        return str(folder)

    def options(self, model, tmp_path, **options):
        document = tmp_path / "notes.txt"
        document.write_text("\n\n".join(words(random.Random(i), 9) + "." for i in range(60)))
        options = {"documents": [str(document)], "lengths": [60, 120], "items": [3], "questions": 2, **options}
        options = {"positions": [0.0, 1.0], "chunk_length": 64, "output_dir": str(tmp_path / "out"), **options}
        return evaluate_example.Arguments(model=model, **options)

    def test_table_scores_and_pictures(self, model, adapter_folder, tmp_path, capsys):
        args = self.options(model, tmp_path, adapter=adapter_folder, tasks=["needles", "key_values"])
        evaluate_example.main(args)
        printed = capsys.readouterr().out
        for title in ("needles: single", "key-value retrieval", "120 tokens", "3 pairs"):
            assert title in printed
        assert printed.count("perplexity of your documents") == 2
        for name in ("needles__single_0", "needles__single_1", "needles__single", "key_value_retrieval", "losses"):
            assert (tmp_path / "out" / f"{name}.png").is_file(), name
        base, adapted = (Result.load(tmp_path / "out" / f"needles__single_{i}.json") for i in (0, 1))
        assert base.lengths == [60, 120] and base.positions == [0.0, 1.0] and len(base.scores) == 8
        assert base.mean("loss") != adapted.mean("loss")

    def test_arguments_are_checked_before_the_model_is_loaded(self, tmp_path):
        with pytest.raises(ValueError, match=r"--tasks names \['needle'\]"):
            evaluate_example.main(self.options(str(tmp_path / "no"), tmp_path, tasks=["needle"]))
        with pytest.raises(ValueError, match="--documents was not given holds none"):
            evaluate_example.main(self.options(str(tmp_path / "no"), tmp_path, documents=[]))
        with pytest.raises(ValueError, match=r"gone.txt: there is no such file"):
            evaluate_example.main(self.options(str(tmp_path / "no"), tmp_path, documents=["gone.txt"]))
