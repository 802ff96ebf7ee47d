"""Which experts the routers choose along a text."""

from typing import Any

import torch

from ..mixture import MixesAngles
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
    gates: dict[str, torch.Tensor] = {}

    def begin(layer: MixesAngles, args: Any) -> None:
        layer.router_gates = {}

    def collect(name: str, layer: MixesAngles) -> None:
        noted, layer.router_gates = layer.router_gates, None
        if noted is not None and adapter_name in noted:
            gates[name] = noted[adapter_name][0].float().cpu()

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, MixesAngles):
            # Hooks of the whole model take notes of training passes only.
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(lambda layer, args, output, name=name: collect(name, layer)))
    try:
        with evaluating(model):
            model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if not gates:
        raise ValueError(f"No layer of this model has routers of the name {adapter_name!r}.")
    return gates
