"""Tests that need vLLM, in an environment of their own: `make test-vllm`. Elsewhere they are not collected."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS.parent / "examples")]

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Engines run in this process, so that many of them cost one import; see `engine` in served_models.py.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1"
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """All tiny models by name."""
    from served_models import ALL_MODELS, serve_on_disk

    return {name: serve_on_disk(tmp_path_factory.mktemp("model"), *what) for name, what in ALL_MODELS.items()}


@pytest.fixture(scope="session")
def with_lora(served, tmp_path_factory):
    """A LoRA adapter of a merged model on disk, and the same in transformers."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from served_models import Served, as_served
    from tiny_models import load

    folder = tmp_path_factory.mktemp("lora")
    llama = served["llama K < N, per layer"]
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load(llama.folder), config).save_pretrained(folder)
    adapted = PeftModel.from_pretrained(as_served(llama.folder, llama.base).merged, folder).eval()
    return str(folder), Served(llama.folder, adapted, llama.base)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A real model, and a text."""
    from served_models import serve_smollm2

    return serve_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session", autouse=True)
def everything_is_made_first(served, with_lora, smollm2):
    """Before vLLM changes transformers' classes, which it does when the first engine starts."""
