"""Tensor parallelism of transformers, launched in several processes by `test_distributed.py`.

Usage: `torchrun --nproc-per-node 2 distributed_inference.py MODEL ADAPTER OUTPUT`
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from tiny_models import layers_of, load, token_ids, wide_config
from transformers import AutoModelForCausalLM


def main(model_folder: str, adapter: str, output: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    result = spread_heads(model_folder, adapter)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(result))
    dist.destroy_process_group()


def spread_heads(model_folder: str, adapter: str) -> dict:
    """Differences between one process and tensor parallelism, and the errors of what is refused."""
    ids = token_ids(2, 12)
    alone = PeftModel.from_pretrained(load(model_folder), adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder, tp_plan="auto").eval()
    local_heads = base.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] // base.config.head_dim
    spread = PeftModel.from_pretrained(base, adapter).eval()
    result = {"local_heads": local_heads, "errors": []}
    with torch.no_grad():
        logits = spread(ids).logits
        result["difference"] = (logits - alone(ids).logits).abs().max().item()
        with spread.disable_adapter():
            result["effect"] = (logits - spread(ids).logits).abs().max().item()
        generated = [model.generate(ids, max_new_tokens=6, do_sample=False).tolist() for model in (spread, alone)]
    result["same_text"] = generated[0] == generated[1]
    refused = [lambda: trainable(spread).train()(input_ids=ids, labels=ids)]
    for overrides in ({"router_scope": "head"}, {"init_weights": "identity"}):
        refused.append(lambda overrides=overrides: spread.add_adapter("refused", wide_config(**overrides)))
    for call in refused:
        try:
            call()
        except ValueError as error:
            result["errors"].append(str(error))
    return result


def trainable(model: PeftModel) -> PeftModel:
    for layer in layers_of(model):
        layer.moice_router.requires_grad_(True)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
