"""What an adapter is, in words and numbers: from its files, without its base model."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files.weights import read_header, read_json
from ..rope.rules import RopeExpert, facts_of, rules_of
from ..routing.describing import router_facts
from ..routing.spec import PEFT_TYPE_NAME, RouterSpec
from ..standalone.built_in import ROUTERS_NAME
from ..standalone.description import read_description
from ..standalone.models import MODEL_TYPE
from .config import MoICEConfig

_ADAPTER_ROUTERS = "moice_router"


def describe_saved(source: str) -> dict[str, Any]:
    """What a saved adapter or merged model is.

    Args:
        source: its folder, or its id on the Hub.

    Returns:
        In JSON's types: `kind` ("adapter" or "merged model"), `base_model`, `routers` (base angles, K and shape of
        each), `ropes` (rules by position and distance; `in_words` says the same of both), `layers` (names of the
        attention modules that have routers), `parameters` and `dtypes` of the routers (None without weights at hand),
        `bytes` of all weights, `versions` that it was saved with, and `card`, the metadata of its model card or None.

    Raises:
        ValueError, TypeError: it is neither, or damaged.
    """
    folder = _folder_of(source)
    if (folder / CONFIG_NAME).is_file():
        found = _describe_adapter(source, folder)
    elif (folder / "config.json").is_file():
        found = _describe_merged(source, folder)
    else:
        raise ValueError(
            f"{source} holds neither {CONFIG_NAME} nor config.json. Name the folder that `save_pretrained` wrote."
        )
    card = folder / "README.md"
    metadata = ModelCard.load(card).data.to_dict() if card.is_file() else None
    return {"source": source, **found, "card": metadata}


def _describe_adapter(source: str, folder: Path) -> dict[str, Any]:
    fields = read_json(folder / CONFIG_NAME)
    if fields.get("peft_type") != PEFT_TYPE_NAME:
        raise ValueError(
            f"{source} is an adapter of the PEFT type {fields.get('peft_type')!r}, not {PEFT_TYPE_NAME!r}. Name an "
            "adapter of MoICE."
        )
    config = MoICEConfig.from_pretrained(str(folder))
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    return {
        "kind": "adapter",
        "base_model": config.base_model_name_or_path,
        **_describe_routers(config.router_specs(), config.ropes_by_position()),
        **_describe_weights([weights] if weights.is_file() else [], _ADAPTER_ROUTERS),
        "also_saved": list(config.modules_to_save or []),
        "versions": {"peft": fields.get("peft_version")},
    }


def _describe_merged(source: str, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get("moice"), dict):
        raise ValueError(
            f"{source} is a model of the type {config.get('model_type')!r} without routers. Name an adapter, or a "
            "model that `merge_and_unload` returned."
        )
    described = read_description(config["moice"])
    weights = _describe_weights(sorted(folder.glob("*.safetensors")), ROUTERS_NAME)
    return {
        "kind": "merged model",
        "base_model": f"built in ({config.get('base_model_type')})",
        **_describe_routers(described.routers, described.ropes),
        **weights,
        "layers": list(described.layers),
        "also_saved": [],
        "versions": {"transformers": config.get("transformers_version")},
    }


def _describe_routers(specs: list[RouterSpec], ropes: Sequence[RopeExpert]) -> dict[str, Any]:
    routers = [{**dataclasses.asdict(spec), "num_experts": spec.num_experts} for spec in specs]
    return {"routers": routers, "ropes": rules_of(ropes), "in_words": router_facts(specs) | facts_of(ropes)}


def _describe_weights(files: list[Path], marker: str) -> dict[str, Any]:
    """Layers, parameters and dtypes of the routers in `files`, whose names hold `marker`, and the size of all."""
    if not files:
        return {"layers": [], "parameters": None, "dtypes": None, "bytes": None}
    layers: dict[str, None] = {}
    parameters, dtypes = 0, set()
    for name, tensor in (entry for file in files for entry in read_header(file).items()):
        layer, found, _ = name.partition(f".{marker}")
        if found:
            layers[layer.removeprefix("base_model.model.")] = None
            parameters += math.prod(tensor.shape)
            dtypes.add(tensor.dtype)
    return {
        "layers": list(layers),
        "parameters": parameters,
        "dtypes": sorted(dtypes),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _folder_of(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: there is no such folder. Give the folder of an adapter, or its id on the Hub.")
    files = ["*.json", "README.md", SAFETENSORS_WEIGHTS_NAME]
    return Path(snapshot_download(source, allow_patterns=files))
