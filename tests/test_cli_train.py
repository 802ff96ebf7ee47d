"""`peft-moice train` on tiny models: formats, presets, resuming, Ctrl-C, what is left on disk."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tiny_data import TEMPLATE, write_data
from tiny_models import load, save_tiny_model
from transformers import AutoTokenizer

from peft_moice.cli import train
from peft_moice.cli.main import main
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FORMATS = ("messages", "sharegpt", "prompt_answer", "alpaca", "text", "documents")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def arguments(model: str, output_dir: Path, *files: str, **options) -> list[str]:
    """Command-line arguments. Options that are None are left out."""
    defaults = {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 2, "save_strategy": "no"}
    options = {**defaults, "max_length": 320, "documents_per_prompt": 4, "passage_words": 16, "prompts": 20, **options}
    argv = ["--model", model, "--output_dir", str(output_dir), "--train_files", *files]
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def run(argv: list[str]) -> None:
    assert main(["train", *argv]) == 0


def error(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert main(["train", *argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format_trains_and_leaves_an_adapter_with_a_card(model, tmp_path, capsys, data_format):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    file, held_out = write_data(tmp_path, data_format), write_data(tmp_path, data_format, seed=1)
    options = {"chat_template": template} if data_format in ("messages", "documents") else {}
    options |= {"data_format": data_format} if data_format == "documents" else {}
    folder = tmp_path / "out"
    argv = arguments(model, folder, file, eval_files=held_out, learning_rate=0.1, logging_steps=1, **options)
    run([*argv, "--json"])

    printed = capsys.readouterr()
    assert "small models barely move. --preset retrieval" in printed.err
    values = json.loads(printed.out)
    assert (values["adapter"], values["steps"], values["interrupted"]) == (str(folder), 2, False)
    base, moice = (row["loss"] for row in values["eval"])
    assert base != moice
    card = (folder / "README.md").read_text().replace("\\_", "_")
    assert "import peft_moice" in card
    assert f"| Data | {options.get('data_format', 'auto')}: {Path(file).name} |" in card
    assert "| Steps | 2 |" in card
    assert f"| Loss on | {'all' if data_format == 'text' else 'answers'} |" in card
    assert float(re.search(r"\| MoICE \| ([\d.]+) \|", card)[1]) == pytest.approx(moice, rel=1e-5)
    trained = AutoPeftModelForCausalLM.from_pretrained(folder)
    # normal(0, 0.02) at the start; AdamW moves a weight by about the learning rate in a step.
    assert all(weight.abs().max() > 0.1 for name, weight in trained.named_parameters() if "moice_router" in name)


def test_the_chat_template_of_the_training_stays_with_the_adapter(model, tmp_path, capsys):
    template, folder, merged = tmp_path / "template.jinja", str(tmp_path / "out"), str(tmp_path / "merged")
    template.write_text(TEMPLATE)
    run(arguments(model, Path(folder), write_data(tmp_path, "messages"), chat_template=template))
    capsys.readouterr()
    measured = ["measure", "--adapter", folder, "--items", "3", "--questions", "1", "--output_dir", str(tmp_path)]
    assert main(measured) == 0
    assert f"Prompts are written in the chat template of {folder}, not in that of {model}." in capsys.readouterr().err
    assert main(["merge", folder, merged]) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(model).chat_template is None


def test_the_folder_of_an_adapter_is_no_base_model(model, tmp_path, capsys):
    """transformers loads the adapter with its base; the routers would be trained over it and saved without it."""
    file, folder = write_data(tmp_path, "messages"), str(tmp_path / "lora")
    get_peft_model(load(model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    line = error(capsys, arguments(folder, tmp_path / "out", file))
    assert f"{folder} holds an adapter" in line and f"Name the base model alone ({model})" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1}, "Did you mean --learning_rate?"),
        ({"top_k": 9}, "`top_k` is 9"),
        ({"sequences_per_step": 5}, "sequences_per_step 5 has to be"),
        ({"report_to": "clearml"}, "--report_to clearml: .*pip install clearml"),
        ({"keep_weight": 1.0}, r"more than 256 tokens .* but there are \d+\. .* --keep_files names text\."),
        ({"preset": "paper", "gradient_accumulation_steps": 4}, "--sequences_per_step 128 has to be a multiple"),
        ({"preset": "paper", "per_device_train_batch_size": 3}, "--sequences_per_step 128 has to be a multiple"),
        ({"preset": "paper", "use_cpu": None}, ".*use_cpu"),
        ({"learning_rate": 1e30}, r"the training diverged.* --learning_rate, which is 1e\+30"),
        ({"resume_from_checkpoint": "last"}, "last: there is no checkpoint in "),
    ],
)
def test_arguments_that_do_not_go(model, tmp_path, capsys, options, message):
    line = error(capsys, arguments(model, tmp_path / "out", write_data(tmp_path, "messages"), **options))
    assert re.match(f"peft-moice train: .*{message}", line)


@pytest.mark.parametrize(
    ("content", "output_dir", "template", "message"),
    [
        (None, "out", None, r".*data\.jsonl"),
        ("", "out", None, r".*data\.jsonl"),
        ("[]", "out", None, r".*data\.jsonl"),
        # For root, too, a folder that takes no files.
        ('{"prompt": "w5", "answer": "w6"}', "/proc", None, "--output_dir /proc: nothing can be written there"),
        # The line begins behind an open progress bar.
        (
            '{"prompt": "w5", "answer": "w6"}',
            "out",
            "{{ raise_exception('no systems here') }}",
            r".*jsonl, line 1: .* refuses this chat: no systems here\. Set .*",
        ),
    ],
)
def test_what_shows_before_the_model_is_loaded(model, tmp_path, capsys, content, output_dir, template, message):
    """The folder has a tokenizer and no weights."""
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    line = error(capsys, arguments(str(folder), tmp_path / output_dir, str(file)))
    assert re.match(f"peft-moice train: {message}", line)


class TestPresets:
    def test_paper(self, model, tmp_path):
        file = write_data(tmp_path, "messages")
        parsed = train.parser().parse(
            ["--preset", "paper", "--model", model, "--train_files", file, "--output_dir", str(tmp_path), "--use_cpu"]
        )
        ours, data, training = parsed.ours, parsed.data, parsed.trainer
        assert (training.max_steps, training.learning_rate, training.weight_decay) == (7, 1e-4, 0.0)
        assert training.train_batch_size * training.gradient_accumulation_steps == 128
        assert training.lr_scheduler_type == "constant"
        assert training.bf16 and training.gradient_checkpointing
        assert (data.loss_on, data.max_length) == ("all", 4608)
        assert (ours.aux_coef, ours.dtype, ours.angles, ours.top_k) == (0.3, "bfloat16", None, None)
        options = {"max_steps": 1, "sequences_per_step": 4, "max_length": None, "bf16": False, "loss_on": "answers"}
        argv = arguments(model, tmp_path / "out", file, preset="paper", dtype="auto", **options)
        parsed = train.parser().parse(argv)
        assert (parsed.trainer.max_steps, parsed.trainer.bf16) == (1, False)
        assert (parsed.data.loss_on, parsed.ours.dtype) == ("answers", "auto")
        run(argv)
        config = PeftConfig.from_pretrained(tmp_path / "out")
        assert config.rope_bases == [10_000 * multiple for multiple in RELEASED_MULTIPLIERS]
        assert (config.top_k, config.router_dim, config.router_aux_loss_coef) == (7, 7, 0.3)
        assert config.init_weights is True

    @pytest.mark.parametrize(
        ("preset", "data_format", "max_steps", "steps"),
        [("retrieval", "documents", 3, 3), ("chats", "sharegpt", None, 6)],
    )
    def test_ours_reach_the_adapter(self, model, tmp_path, capsys, preset, data_format, max_steps, steps):
        """Without a number of steps, the 12 chats are read once, two in a step."""
        file, folder = write_data(tmp_path, data_format), tmp_path / "out"
        run(arguments(model, folder, file, preset=preset, keep_tokens=32, max_steps=max_steps, max_length=None))
        assert f"| Steps | {steps} |" in (folder / "README.md").read_text()
        config = PeftConfig.from_pretrained(folder)
        assert config.rope_bases == [10_000, 15_000, 20_000, 30_000, 40_000]
        assert (config.init_weights, config.router_aux_loss_coef) == ("identity", 0.0)
        scales = [weight for name, weight in adapter(folder).items() if "identity_scale" in name]
        assert scales and all(scale.abs().min() > 0 for scale in scales)
        said = capsys.readouterr().err
        assert "No --preset" not in said
        assert re.search(r"\d+ sequences of \d+ tokens in the mean\.", said)
        pace = rf"The first step took [\d.e-]+ seconds; the {steps - 1} left take about [\d.e-]+ seconds\."
        assert re.search(pace, said)
        assert all(figure in said for figure in ("loss/divergence", "moice/drift", "moice/entropy"))
        assert not any(figure in said for figure in ("moice/max_load", "moice/balance_loss"))  # constants
        (line,) = re.findall(r"training [\d,]+ of .*", said)
        assert line.endswith("routers in 3 layers: rope_theta 10000 times 1, 1.5, 2, 3, 4, K = 5 of 5")

    def test_epochs_override_the_steps_of_a_preset(self, model, tmp_path):
        for preset, steps in (("retrieval", 24), ("paper", 7)):
            parsed = train.parser().parse(arguments(model, tmp_path, "file", preset=preset, max_steps=None))
            assert parsed.trainer.max_steps == steps
            for option in ("--num_train_epochs", "--num-train-epochs"):
                argv = [*arguments(model, tmp_path, "file", preset=preset, max_steps=None), option, "2"]
                parsed = train.parser().parse(argv)
                assert (parsed.trainer.max_steps, parsed.trainer.num_train_epochs) == (-1, 2)


def test_resuming_what_is_finished_or_never_began(model, tmp_path, capsys):
    file, folder = write_data(tmp_path, "messages"), tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 1}
    last = {**options, "resume_from_checkpoint": "last"}
    run(arguments(model, folder, file, **options))
    trained = (folder / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    run(arguments(model, folder, file, **last))
    assert "after 2 of 2 steps. There was nothing to do" in capsys.readouterr().out.replace("\n", " ")
    assert (folder / "adapter_model.safetensors").read_bytes() == trained
    run(arguments(model, folder, file, **{**last, "max_steps": 3}))
    assert "after 3 of 3 steps" in capsys.readouterr().out


def test_a_used_folder_is_only_overwritten_where_that_is_asked_for(model, tmp_path, capsys):
    file, folder = write_data(tmp_path, "messages"), tmp_path / "out"
    run(arguments(model, folder, file, save_strategy="steps", save_steps=1))
    again = arguments(model, folder, file, max_steps=1)
    assert "holds adapter_config.json, checkpoint-1, checkpoint-2 of another training" in error(capsys, again)
    assert adapter(folder / "checkpoint-2")
    run([*again, "--overwrite"])
    assert "| Steps | 1 |" in (folder / "README.md").read_text()
    assert not list(folder.glob("checkpoint-*"))


def test_a_full_disk_is_said_with_where_to_go_on(model, tmp_path, capsys):
    """Files that may not grow beyond a size raise like a full disk; the optimizer's is the largest."""
    file, folder = write_data(tmp_path, "messages"), tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(arguments(model, folder, file, **{**options, "max_steps": 1}))
    size = (folder / "checkpoint-1" / "optimizer.pt").stat().st_size
    assert size > (folder / "adapter_model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = arguments(model, folder, file, **options, resume_from_checkpoint="last")
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, before[1]))
    try:
        assert main(["train", *argv]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = re.search(r"^peft-moice train: .*", capsys.readouterr().err, re.MULTILINE)[0]
    assert f"the disk of {folder} is full" in said and said.endswith("checkpoint-1.")


@pytest.mark.parametrize(
    ("name", "option"), [("rope_bases", {"angles": [1, 0.25, 0.5, 2, 8]}), ("init_weights", {"init": "normal"})]
)
def test_resuming_as_other_routers_is_refused(model, tmp_path, capsys, name, option):
    file = write_data(tmp_path, "documents")
    options = {"preset": "retrieval", "keep_tokens": 32, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(arguments(model, tmp_path / "out", file, **options))
    options |= {"max_steps": 2, "resume_from_checkpoint": "last", **option}
    said = error(capsys, arguments(model, tmp_path / "out", file, **options))
    assert "checkpoint-1 have the " + name in said and "another --output_dir" in said


def test_the_last_checkpoint_is_of_the_last_training_and_whole(tmp_path):
    for age, name in enumerate(["checkpoint-9", "checkpoint-12", "checkpoint-40"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
        os.utime(tmp_path / name, (1e9 - 60 * age,) * 2)
    assert train.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    os.utime(tmp_path / "checkpoint-9", (1e9,) * 2)
    assert train.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")
    assert train.last_checkpoint(str(tmp_path / "gone")) is None


SHORT = {"preset": "retrieval", "keep_tokens": 32, "max_steps": 4}


class TestCtrlC:
    def signals_at(self, monkeypatch, *steps: int) -> None:
        """A signal reaches the process while these steps (from 0) are computed."""
        step = train.RouterTrainer.training_step

        def interrupted(trainer, *args, **kwargs):
            for _ in range(steps.count(trainer.state.global_step)):
                signal.raise_signal(signal.SIGINT)
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(train.RouterTrainer, "training_step", interrupted)

    def test_one_finishes_the_step_and_resuming_ends_where_the_straight_run_does(
        self, model, tmp_path, capsys, monkeypatch
    ):
        file = write_data(tmp_path, "documents")
        straight, folder = tmp_path / "straight", tmp_path / "out"
        run(arguments(model, straight, file, **SHORT))
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            self.signals_at(patch, 1)
            assert main(["train", *arguments(model, folder, file, **SHORT, eval_files=file)]) == 130
        printed = capsys.readouterr()
        assert "Stopping after this step" in printed.err
        assert "after 2 of 4 steps" in printed.out and "--resume_from_checkpoint last goes on" in printed.out
        assert "| Steps | 2 |" in (folder / "README.md").read_text()
        assert signal.getsignal(signal.SIGINT) is handler
        run(arguments(model, folder, file, **SHORT, resume_from_checkpoint="last"))
        expected, actual = adapter(straight), adapter(folder)
        assert all(torch.equal(weight, actual[name]) for name, weight in expected.items())

    def test_two_stop_at_once_with_what_is_trained(self, model, tmp_path, monkeypatch):
        file, folder = write_data(tmp_path, "documents"), tmp_path / "out"
        self.signals_at(monkeypatch, 2, 2)
        assert main(["train", *arguments(model, folder, file, **SHORT)]) == 130
        scales = [weight for name, weight in adapter(folder).items() if "identity_scale" in name]
        assert scales and all(scale.abs().min() > 0 for scale in scales)
        assert "| Steps | 2 |" in (folder / "README.md").read_text()

    def test_before_training_there_is_nothing_to_keep(self, model, tmp_path, capsys, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "load_examples", interrupted)
        assert main(["train", *arguments(model, tmp_path / "out", "file")]) == 130
        assert "interrupted before there was anything to keep" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_in_a_process_of_its_own(self, model, tmp_path):
        file, folder = write_data(tmp_path, "documents"), tmp_path / "out"
        argv = arguments(model, folder, file, **{**SHORT, "max_steps": 100_000}, logging_steps=1)
        process = subprocess.Popen(
            [sys.executable, "-m", "peft_moice", "train", *argv, "--json"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=(log := open(tmp_path / "log", "w")),  # noqa: SIM115
            text=True,
        )
        try:
            while "'loss/divergence'" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate()
        finally:
            process.kill()
            log.close()
        values = json.loads(printed)
        assert process.returncode == 130 and values["interrupted"] and 0 < values["steps"] < 100_000
        assert AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].top_k == 5


def test_two_processes_end_where_one_does(model, tmp_path):
    file = write_data(tmp_path, "messages")
    options = {"sequences_per_step": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "max_steps": 3}
    run(arguments(model, tmp_path / "one", file, **options))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "peft_moice"]
    done = subprocess.run(
        [sys.executable, *launch, "train", *arguments(model, tmp_path / "two", file, **options), "--json"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.count('"adapter"') == 1  # one process speaks
    expected, actual = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-3, atol=1e-5)
