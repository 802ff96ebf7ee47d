"""Two CPU processes, for each engine: the same steps, logs and adapter file as one process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from test_trainer import SGD, adapted, padded, rows, trainer_of

from peft_moice.training.callback import MoICECallback

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_file(actual: Path, expected: Path) -> None:
    expected_tensors = saved(expected)
    assert saved(actual).keys() == expected_tensors.keys()
    for name, value in saved(actual).items():
        torch.testing.assert_close(value, expected_tensors[name], rtol=1e-4, atol=1e-6)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (actual, expected)]
    assert configs[0] == configs[1]


def launch(*command: str, **environment: str) -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    finished = subprocess.run(
        [sys.executable, "-m", *command], env=variables, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]


def launch_in_two(script: str, *arguments: str, **environment: str) -> None:
    options = ["--standalone", "--nproc-per-node", "2"]
    launch("torch.distributed.run", *options, str(TESTS / script), *arguments, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1"])
def test_trainer_under_accelerate(llama, tmp_path, engine):
    """The example configs, with as many processes and the precision that CPUs have."""
    model = adapted(llama)
    alone = trainer_of(model, tmp_path, **SGD)
    alone.add_callback(MoICECallback(alone))
    alone.train()
    alone.save_model(str(tmp_path / "alone"))

    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    if engine == "fsdp1":
        options += ["--fsdp_sync_module_states", "false"]  # needs an accelerator
    launch(
        "accelerate.commands.launch",
        *("--config_file", str(CONFIGS / f"{engine}.yaml")),
        *options,
        str(TESTS / "distributed_trainer.py"),
        *(llama, str(tmp_path / engine), "per_device_train_batch_size=2", "gradient_accumulation_steps=2"),
    )
    for folder in ("adapter", "outside") if engine == "ddp" else ("adapter",):
        assert_same_file(tmp_path / engine / folder, tmp_path / "alone")
    result = json.loads((tmp_path / engine / "result.json").read_text())
    assert result["processes"] == 2
    assert result["engine"] == ("DistributedType.MULTI_CPU" if engine == "ddp" else "DistributedType.FSDP")
    assert result["eval_loss"] == pytest.approx(alone.evaluate(rows(4))["eval_loss"], rel=1e-5)
    for kind in ("loss", "moice/balance_loss"):
        entries = [entry for entry in alone.state.log_history if kind in entry]
        assert len(entries) == len(result[kind]) == 2
        for entry, actual in zip(entries, result[kind], strict=True):
            for name, value in entry.items():
                assert actual[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_tensor_parallelism(llama, tmp_path):
    adapted(llama).save_pretrained(tmp_path / "adapter")
    launch_in_two("distributed_inference.py", llama, str(tmp_path / "adapter"), str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["local_heads"] == 2
    assert result["difference"] < 1e-5 < 1e-2 < result["effect"]
    assert result["same_text"]
    training, per_head, identity = result["errors"]
    assert "cannot be trained under tensor parallelism" in training
    assert "has weights per head" in per_head
    assert "has weights per head" in identity


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(llama, tmp_path):
    alone = adapted(llama).train()
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=SGD["learning_rate"])
    for step in range(2):
        batch = padded(rows()[8 * step : 8 * step + 8])
        alone(**batch, num_items_in_batch=batch["labels"][:, 1:].ne(-100).sum()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    alone.save_pretrained(tmp_path / "alone")
    launch_in_two("distributed_deepspeed.py", llama, str(tmp_path), DS_ACCELERATOR="cpu")
    for stage in (2, 3):
        assert_same_file(tmp_path / f"zero{stage}", tmp_path / "alone")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configs_are_valid(path):
    """accelerate knows every key."""
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.distributed_type == {"d": "MULTI_GPU", "f": "FSDP", "z": "DEEPSPEED"}[path.stem[0]]
