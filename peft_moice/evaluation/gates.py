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
    names = {module: name for name, module in model.named_modules() if isinstance(module, MixesAngles)}
    collector = _Collector(adapter_name)
    before = {layer: layer.recorder for layer in names}
    try:
        with evaluating(model):
            for layer in names:
                layer.recorder = collector
            model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer, recorder in before.items():
            layer.recorder = recorder
    gates = {name: collector.gates[layer] for layer, name in names.items() if layer in collector.gates}
    if not gates:
        raise ValueError(f"No layer of this model has routers of the name {adapter_name!r}.")
    return gates


class _Collector:
    """Receives the records of a pass and keeps the gates of one adapter's routers."""

    def __init__(self, adapter_name: str):
        self.adapter_name = adapter_name
        self.gates: dict[MixesAngles, torch.Tensor] = {}

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        for record in records:
            if record.share.name == self.adapter_name:
                self.gates[layer] = record.gates[0].float().cpu()
