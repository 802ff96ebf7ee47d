"""Which experts the routers choose along a text."""

from typing import Any

import torch

from ..mixture import MixesAngles, RouterRecord
from .mode import evaluating


def gates_along(model: Any, input_ids: torch.Tensor, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Gates `[H, S, N]` of each adapted layer, by the layer's name, in the order of layers.

    Args:
        model: a model with MoICE routers.
        input_ids: one sequence `[S]` of token ids.
        adapter_name: whose routers. Default: "default".

    Raises:
        ValueError: the model has no routers of this name.
    """
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, MixesAngles)}
    collector = _Collector(adapter_name)
    recorders = {layer: layer.recorder for layer in layers}
    try:
        for layer in layers:
            layer.recorder = collector
        with evaluating(model):
            model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer, recorder in recorders.items():
            layer.recorder = recorder
    if not collector.gates:
        raise ValueError(f"No layer of this model has routers of the name {adapter_name!r}.")
    return {layers[layer]: gates for layer, gates in collector.gates.items()}


class _Collector:
    """Recorder of the gates `[H, S, N]` of one adapter, by layer."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.gates: dict[MixesAngles, torch.Tensor] = {}

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        for record in records:
            if record.share.name == self.adapter_name:
                self.gates[layer] = record.gates[0].cpu()
