"""The command line: help, errors, and the small commands, through its real entry point on tiny models."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapted_model, load, logits_of, save_tiny_model, wide_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_moice
from peft_moice.cli.main import COMMANDS, main
from peft_moice.evaluation.angles import search_angles

ROOT = Path(__file__).parents[1]


def run_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, *argv: str) -> str:
    """The one line that a command says, where something has to be changed."""
    capsys.readouterr()
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    (line,) = [line for line in lines if line.startswith("peft-moice")]
    assert line == lines[-1]  # before it, there may be the progress of what went well
    return line


class TestHelp:
    def test_the_overview_names_every_command(self, capsys):
        for argv in ([], ["--help"]):
            assert main(argv) == 0
            printed = capsys.readouterr().out
            assert all(f"  {name} " in printed for name in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_explains_itself_on_one_screen(self, capsys, command):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert 10 < len(lines) <= 54 and max(map(len, lines)) <= 121
        assert any(line.startswith(f"  peft-moice {command}") for line in lines)

    def test_train_explains_formats_and_presets_and_can_list_everything(self, capsys):
        for option, expected in (
            ("--help", ["sharegpt", "alpaca", "parquet", "retrieval ", "chats ", "paper "]),
            ("--help_all", ["--adam_beta1", "--fsdp", "--keep_weight", "--passage_words"]),
        ):
            with pytest.raises(SystemExit):
                main(["train", option])
            printed = capsys.readouterr().out
            assert all(text in printed for text in expected)

    def test_a_default_of_0_is_said_like_others(self, capsys):
        with pytest.raises(SystemExit):
            main(["measure", "--help"])
        printed = capsys.readouterr().out
        for option, default in (("--seed", "0"), ("--questions", "8")):
            assert re.search(rf"  {option} N .* \[{default}\]\n", printed)

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == peft_moice.__version__


class TestErrors:
    def test_unknown_commands_and_arguments(self, capsys):
        assert "there is no command 'mesure'. Choose one of extend, measure, train" in error(capsys, "mesure")
        assert "Did you mean --lengths?" in error(capsys, "measure", "--length", "5")
        assert "required: ADAPTER" in error(capsys, "info")
        assert "invalid choice: 'chat'" in error(capsys, "train", "--preset", "chat", "--model", "m")
        assert "invalid int value: 'x'" in error(capsys, "angles", "--num_experts", "x")

    def test_missing_models_and_adapters(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        gone = str(tmp_path / "gone")
        assert f"--model {gone}: there is no such folder" in error(capsys, "measure", "--model", gone)
        train = ["train", "--train_files", "f", "--output_dir", str(tmp_path / "out"), "--model"]
        assert f"--model {gone}: there is no such folder" in error(capsys, *train, gone)
        assert "Name it with --model" in error(capsys, "measure")
        assert "there is no such folder" in error(capsys, "info", gone)
        assert "gone" in error(capsys, "merge", gone, str(tmp_path / "merged"))
        assert "holds neither adapter_config.json nor config.json" in error(capsys, "info", str(tmp_path))

    def test_folders_beside_the_right_one(self, capsys, llama, adapter, tmp_path):
        above = str(Path(adapter).parent)
        options = ["--items", "3", "--output_dir", str(tmp_path / "out")]
        line = error(capsys, "measure", "--adapter", above, *options)
        assert f"--adapter {above}: the folder holds no adapter_config.json. {adapter} does; name that." in line
        bare = shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
        line = error(capsys, "measure", "--model", str(bare), *options)
        assert f"{bare}: no tokenizer can be read from this folder" in line and "`tokenizer.save_pretrained`" in line
        moved = shutil.copytree(adapter, tmp_path / "moved")
        config = json.loads((moved / "adapter_config.json").read_text())
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
        line = error(capsys, "measure", "--adapter", str(moved), *options)
        assert "the base model of the adapter /gone/base: there is no such folder" in line

    def test_tracebacks_are_shown_where_they_are_asked_for(self, tmp_path):
        with pytest.raises(ValueError, match="there is no such folder"):
            main(["info", str(tmp_path / "gone"), "--traceback"])

    def test_adapters_of_other_types(self, capsys, llama, tmp_path):
        get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        assert "of the PEFT type 'LORA'" in error(capsys, "info", str(tmp_path / "lora"))
        assert "of the type LORA" in error(capsys, "merge", str(tmp_path / "lora"), str(tmp_path / "out")).replace(
            "PeftType.", ""
        )
        assert "without routers" in error(capsys, "info", llama)

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_damaged_files(self, capsys, adapter, file):
        path = Path(adapter, file)
        path.write_bytes(path.read_bytes()[:40])
        assert re.search(rf"{file} is (not JSON|damaged)", error(capsys, "info", adapter))

    def test_bitsandbytes_is_asked_for_before_anything_is_loaded(self, capsys, llama, monkeypatch):
        both = ["measure", "--model", llama, "--load_in_4bit", "--load_in_8bit"]
        assert "--load_in_4bit and --load_in_8bit exclude each other" in error(capsys, *both)
        monkeypatch.setattr("peft_moice.cli.models.is_bitsandbytes_available", lambda: False)
        assert "need bitsandbytes: pip install bitsandbytes" in error(capsys, *both[:-1])
        train = ["train", "--model", llama, "--train_files", "gone", "--use_cpu", "--load_in_8bit"]
        assert "need bitsandbytes" in error(capsys, *train)

    def test_notices_for_those_who_call_libraries_are_left_out_meanwhile(self, capsys, llama, adapter, monkeypatch):
        def run(args):
            warnings.warn("`old` is deprecated. Use `new`.", FutureWarning, stacklevel=1)
            logging.getLogger("transformers.utils.generic").warning("`old` is deprecated")
            load(llama)
            return describe(args)

        describe = COMMANDS["info"].run
        monkeypatch.setattr(COMMANDS["info"], "run", run)

        def settings():
            bars = transformers.utils.logging.is_progress_bar_enabled()
            return bars, logging.getLogger("transformers.utils.generic").level, warnings.filters[:]

        before = settings()
        capsys.readouterr()
        assert main(["info", adapter]) == 0
        assert capsys.readouterr().err == ""
        assert settings() == before

    def test_the_log_is_as_it_was_afterwards(self, capsys, tmp_path):
        logger = logging.getLogger("peft_moice")
        before = list(logger.handlers), logger.level
        error(capsys, "info", str(tmp_path))
        assert (logger.handlers, logger.level) == before


class TestInfo:
    def test_an_adapter_is_described_from_its_files(self, capsys, llama, tmp_path):
        folder = str(tmp_path / "adapter")
        model = adapted_model(llama, router_scope="head", layers_to_transform=[0, 2], init_weights="identity")
        model.save_pretrained(folder)
        found = run_json(capsys, "info", folder)
        (router,) = found["routers"]
        assert router["rope_bases"] == [10_000, 2_500, 5_000, 40_000]
        assert (router["top_k"], router["num_experts"], router["router_scope"]) == (2, 4, "head")
        assert found["layers"] == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
        assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert found["base_model"] == llama and found["versions"]["peft"]
        assert found["bytes"] == Path(folder, "adapter_model.safetensors").stat().st_size
        assert main(["info", folder]) == 0
        printed = capsys.readouterr().out
        assert "10000, 2500, 5000, 40000 (1, 0.25, 0.5, 4 times the first)" in printed
        assert "2 of 4 per head and token" in printed

    def test_layers_are_in_the_order_of_their_numbers_and_the_version_is_said(self, capsys, tmp_path):
        deep, folder = save_tiny_model(tmp_path / "deep", num_hidden_layers=11), str(tmp_path / "adapter")
        adapted_model(deep).save_pretrained(folder)
        found = run_json(capsys, "info", folder)
        assert found["layers"] == [f"model.layers.{i}.self_attn" for i in range(11)]
        assert found["versions"]["peft_moice"] == found["card"]["peft_moice_version"] == peft_moice.__version__
        assert main(["info", folder]) == 0
        printed = capsys.readouterr().out
        assert "11: model.layers.0.self_attn to model.layers.10.self_attn" in printed
        assert f"peft_moice {peft_moice.__version__}\n" in printed
        card = Path(folder, "README.md")
        assert f"| peft_moice | {peft_moice.__version__} |" in card.read_text().replace("\\_", "_")
        card.unlink()  # as a version that did not write it
        assert run_json(capsys, "info", folder)["versions"]["peft_moice"] is None

    def test_angles_by_layer_type_and_several_routers(self, capsys, tmp_path):
        gemma = save_tiny_model(tmp_path / "gemma", "gemma3")
        model = get_peft_model(load(gemma), wide_config(), adapter_name="a")
        model.add_adapter("b", wide_config())
        model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "both", combination_type="cat")
        model.save_pretrained(tmp_path, selected_adapters=["both"])
        found = run_json(capsys, "info", str(tmp_path / "both"))
        assert [router["weight"] for router in found["routers"]] == [0.25, 0.75]
        assert main(["info", str(tmp_path / "both")]) == 0
        printed = capsys.readouterr().out
        (row,) = (line for line in printed.splitlines() if line.startswith("Router 2 of 2, share 0.75: Base angles"))
        assert "sliding_attention: 10000, 2500, 5000, 40000 (1, 0.25, 0.5, 4 times the first)" in row
        assert "full_attention: 1000000, 250000, 500000, 4000000 (1, 0.25, 0.5, 4 times the first)" in row


class TestMerge:
    def test_the_merged_folder_computes_what_the_adapter_does(self, capsys, adapted, adapter, tmp_path):
        folder = str(tmp_path / "merged")
        made = run_json(capsys, "merge", adapter, folder)
        assert made["class"] == "MoICELlamaForCausalLM"
        merged = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=0, atol=1e-6)
        assert AutoTokenizer.from_pretrained(folder)("w5 w6")["input_ids"] == [5, 6]
        found = run_json(capsys, "info", folder)
        assert (found["kind"], found["base_model"]) == ("merged model", "built in (llama)")
        assert found["parameters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert found["layers"] == [f"model.layers.{i}.self_attn" for i in range(3)]

    def test_folders_with_something_in_them_are_not_overwritten(self, capsys, adapter, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("mine")
        assert "is there already" in error(capsys, "merge", adapter, str(tmp_path / "out"))


class TestAngles:
    OPTIONS = ("--context_length", "64", "--num_experts", "3", "--prompts", "2", "--facts", "3")

    @pytest.fixture
    def options(self, tmp_path) -> list[str]:
        return [*self.OPTIONS, "--output_dir", str(tmp_path / "out")]

    @pytest.mark.slow
    def test_measures_and_searches(self, capsys, tmp_path, options):
        folder = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
        found = run_json(capsys, "angles", "--model", folder, *options)
        (searched,) = found["by_waveform"]
        assert searched["rope_bases"] == search_angles(16, 10_000.0, 64, 3)
        assert searched["rotary_dim"] == 16
        assert found["by_measurement"]["rope_bases"][0] == 10_000
        assert len(found["by_measurement"]["mean_losses"]) == 8
        assert (tmp_path / "out" / "waveforms.png").is_file()

    @pytest.mark.slow
    def test_partial_rotary_counts_the_rotated_dimensions(self, capsys, tmp_path, options):
        folder = save_tiny_model(tmp_path / "model", "phi", max_position_embeddings=1024)
        (searched,) = run_json(capsys, "angles", "--model", folder, *options)["by_waveform"]
        assert searched["rope_bases"] == search_angles(8, 10_000.0, 64, 3) != search_angles(16, 10_000.0, 64, 3)

    @pytest.mark.slow
    def test_angles_by_layer_type_are_searched_one_by_one(self, capsys, tmp_path, options):
        folder = save_tiny_model(tmp_path / "model", "gemma3", max_position_embeddings=1024)
        assert main(["angles", "--model", folder, *options]) == 0
        printed = capsys.readouterr().out
        assert "in layers of type sliding_attention, over 16 rotated dimensions: [10000" in printed
        assert "in layers of type full_attention, over 16 rotated dimensions: [1000000" in printed
        assert "Nothing is measured" in printed
        assert (tmp_path / "out" / "waveforms_full_attention.png").is_file()

    @pytest.mark.slow
    def test_no_pictures_are_named_without_matplotlib(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["angles", "--output_dir", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert "By waveform" in printed.out and "Pictures" not in printed.out
        assert "Without matplotlib no pictures" in printed.err and not list(tmp_path.iterdir())

    def test_bad_input(self, capsys, tmp_path, options):
        folder = save_tiny_model(tmp_path / "model", "gpt2")
        assert "rotary" in error(capsys, "angles", "--model", folder, *options)
        assert "`num_experts` is 99" in error(capsys, "angles", "--num_experts", "99")
        assert "`num_facts` is 99" in error(capsys, "angles", "--facts", "99")


class TestRun:
    @pytest.mark.slow
    def test_a_program_that_knows_peft_alone_finds_the_adapter(self, llama, adapter, tmp_path):
        program = "import json, sys\nfrom peft import PeftConfig\n"
        program += (
            "print(json.dumps([sys.argv[1:], PeftConfig.from_pretrained(sys.argv[1]).peft_type]))\nsys.exit(3)\n"
        )
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, "-m", "peft_moice", "run", "program", adapter, "--json", "--help"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 3
        assert json.loads(done.stdout) == [[adapter, "--json", "--help"], "MOICE"]

    def test_missing_modules(self, capsys):
        assert "no module 'nothing_of_this_name'" in error(capsys, "run", "nothing_of_this_name", "--tasks", "x")

    @pytest.mark.slow
    def test_lm_eval(self, llama, adapter, tmp_path):
        rows = [{"text": "w5 w6 w7", "choices": ["w8", "w9"], "label": label} for label in (0, 1)]
        (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": "tiny", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "train"}
        task |= {"dataset_kwargs": {"data_files": str(tmp_path / "rows.json")}, "doc_to_text": "{{text}}"}
        task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}]}
        (tmp_path / "tiny.yaml").write_text(json.dumps(task))
        options = ["--include_path", str(tmp_path), "--tasks", "tiny", "--device", "cpu", "--batch_size", "2"]
        options += ["--output_path", str(tmp_path / "results.json"), "--log_samples"]
        model = ["--model", "hf", "--model_args", f"pretrained={llama},peft={adapter},dtype=float32"]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "peft_moice", "run", "lm_eval", *model, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        (file,) = tmp_path.rglob("samples_tiny*.jsonl")
        sample = json.loads(file.read_text().splitlines()[0])
        tokenizer, model = AutoTokenizer.from_pretrained(llama), PeftModel.from_pretrained(load(llama), adapter)
        for choice, (found, _) in zip(("w8", "w9"), sample["filtered_resps"], strict=True):
            ids = tokenizer(f"w5 w6 w7 {choice}", return_tensors="pt").input_ids
            expected = logits_of(model, ids)[0, -2].log_softmax(-1)[ids[0, -1]].item()
            assert float(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_as_a_process(adapter):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "peft_moice", "info"]
    done = subprocess.run([*command, adapter, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "adapter"
    failed = subprocess.run([*command, adapter + "x"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == "" and "there is no such folder" in failed.stderr
