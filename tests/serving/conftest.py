"""Tests that need vLLM, in an environment of their own: `make test-vllm`. Elsewhere they are not collected."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # One process, so that ten engines cost one import; see `engine` in served_models.py.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
