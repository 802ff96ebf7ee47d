"""What trains in a model, in a line."""

from peft import PeftModel
from torch import nn

from ..routing.describing import router_in_a_line
from ..routing.mixture import MixesAngles


def describe_training(model: nn.Module) -> str:
    """One line about what trains in a model: parameters, layers, base angles and K of its active adapters."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trainable, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    layers = [module for module in model.modules() if isinstance(module, MixesAngles) and module.shares()]
    specs = {share.name: share.spec for layer in layers for share in layer.shares()}
    routers = "; ".join(map(router_in_a_line, specs.values()))
    share = f"{trainable:,} of {total:,} parameters ({trainable / max(total, 1):.3%})"
    return f"training {share}; routers in {len(layers)} layers: {routers}"
