"""Which experts the routers choose along a text."""

from typing import Any

import torch

from ..probing.evaluation_mode import evaluating
from ..routing.mixture import MixesAngles, RouterRecord


def gates_along(model: Any, input_ids: torch.Tensor, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Gates `[H, S, N]` of each adapted layer, by the layer's name, in the order of layers.

    Args:
        model: a model with MoICE routers.
        input_ids: one sequence `[S]` of token ids.
        adapter_name: whose routers. Those of a mean of adapters are called "NAME.0", "NAME.1", ..., and those of a
            merged model "0", "1", .... Default: "default".

    Raises:
        ValueError: no routers of this name are at work, or `input_ids` are not one sequence.
    """
    if input_ids.dim() != 1:
        raise ValueError(
            f"`input_ids` has the shape {tuple(input_ids.shape)}; give one sequence `[S]`, a row of a batch."
        )
    passed = records_along(model, input_ids)
    gates = {
        name: record.gates[0].float().cpu()
        for name, (_, records) in passed.items()
        for record in records
        if record.share.name == adapter_name
    }
    if not gates:
        known = sorted({record.share.name for _, records in passed.values() for record in records})
        raise ValueError(
            f"No layer of this model has routers of the name {adapter_name!r} at work; those at work are {known}. "
            "Give one of these names as `adapter_name`, or activate the adapter."
        )
    return gates


def records_along(model: Any, input_ids: torch.Tensor) -> dict[str, tuple[MixesAngles, list[RouterRecord]]]:
    """The layers whose routers took part in a pass over `input_ids` `[S]`, by name, and what these recorded."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, MixesAngles)}
    collector = _Collector()
    before = {layer: layer.recorder for layer in names}
    try:
        with evaluating(model):
            for layer in names:
                layer.recorder = collector
            model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer, recorder in before.items():
            layer.recorder = recorder
    return {name: (layer, collector.records[layer]) for layer, name in names.items() if layer in collector.records}


class _Collector:
    """Keeps the records of a pass."""

    def __init__(self) -> None:
        self.records: dict[MixesAngles, list[RouterRecord]] = {}

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        self.records[layer] = records
