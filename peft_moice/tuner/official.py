"""Reads checkpoints of the official MoICE release (https://github.com/p1nksnow/MoICE)."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import TaskType
from safetensors import safe_open
from torch import nn

from ..files.weights import read_json
from .config import MoICEConfig
from .rollback import restored_on_error

_KEY = re.compile(r"(?P<module>.+)\.gate_(?P<part>[123])\.weight$")
# The official forward is `gate_2(act(gate_1(q)) * gate_3(q))`.
_PARTS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}


def load_official_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, torch.Tensor] | str | Path,
    config: MoICEConfig | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Put the routers of an official checkpoint into an adapter on `model`.

    Args:
        model: the base model, such as Llama-2-7B-chat. Its own weights are not read from the checkpoint.
        checkpoint: a state dict, or a folder or file of safetensors or `.bin` weights. Only the routers
            (`gate_1`, `gate_2`, `gate_3` of every layer) are read; `.bin` files are loaded with `weights_only=True`.
        config: angles and `top_k`, which official checkpoints do not record. Default: the released recipe.
        adapter_name: name of the new adapter. Default: "default".

    Raises:
        ValueError: no routers in the checkpoint, or routers that do not fit the model or the config.
        FileNotFoundError: no weights at the given path.
    """
    stored = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    matches = ((_KEY.match(key), tensor) for key, tensor in stored.items())
    tensors = {f"{m['module']}.moice_router.{_PARTS[m['part']]}": tensor for m, tensor in matches if m is not None}
    if not tensors:
        raise ValueError(
            "The checkpoint holds no MoICE routers: no key ends in 'gate_1.weight', 'gate_2.weight' or "
            "'gate_3.weight'. Pass a checkpoint written by the official training script."
        )
    down_proj = next(tensor for key, tensor in tensors.items() if key.endswith("down_proj"))
    num_experts, router_dim = down_proj.shape
    config = config if config is not None else MoICEConfig(task_type=TaskType.CAUSAL_LM)
    if config.num_experts != num_experts:
        raise ValueError(
            f"The checkpoint's routers choose among {num_experts} angles, but the config has {config.num_experts}. "
            "Give the angles of the training run in `config`, as `rope_bases` or `base_multipliers`."
        )
    with restored_on_error(model, config):
        config.router_dim = router_dim
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        _fill_routers(peft_model, tensors, adapter_name)
    return peft_model


def _fill_routers(peft_model: PeftModel, tensors: dict[str, torch.Tensor], adapter_name: str) -> None:
    model = peft_model.get_base_model()
    targets = dict(model.named_parameters())
    expected = {name for name in targets if f".moice_router.{adapter_name}." in name}
    tensors = {key.replace("moice_router.", f"moice_router.{adapter_name}."): value for key, value in tensors.items()}
    if tensors.keys() != expected:
        missing, surplus = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"The checkpoint's routers do not fit {type(model).__name__}: missing {missing[:3]} ({len(missing)}), "
            f"surplus {surplus[:3]} ({len(surplus)}). Load it into the model that it was trained on."
        )
    for name, tensor in tensors.items():
        if targets[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(targets[name].shape)} in the model and {tuple(tensor.shape)} in the "
                "checkpoint. Load it into the model that it was trained on."
            )
        targets[name].data.copy_(tensor)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The router tensors of all weight files at `path`; other tensors of safetensors files are not loaded."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    for index in () if path.is_file() else path.glob("*.index.json"):
        shards = set(read_json(index)["weight_map"].values())
        missing = [name for name in sorted(shards) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} lacks the weight files {missing} that {index.name} names.")
    if not files:
        raise FileNotFoundError(f"No .safetensors or .bin weights at {path}.")
    tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                tensors.update({key: weights.get_tensor(key) for key in weights.keys() if _KEY.match(key)})  # noqa: SIM118
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            tensors.update({key: tensor for key, tensor in weights.items() if _KEY.match(key)})
    return tensors
