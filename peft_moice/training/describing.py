"""What trains in a model, in a line."""

from peft import PeftModel
from torch import nn

from ..routing.mixture import MixesAngles
from ..routing.spec import Bases


def describe_training(model: nn.Module) -> str:
    """One line about what trains in a model: parameters, layers, base angles and K of its active adapters."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trainable, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    layers = [module for module in model.modules() if isinstance(module, MixesAngles) and module.shares()]
    specs = {share.name: share.spec for layer in layers for share in layer.shares()}
    routers = "; ".join(
        f"rope_theta {_angles_in_words(spec.rope_bases)}, K = {spec.top_k} of {spec.num_experts}"
        for spec in specs.values()
    )
    share = f"{trainable:,} of {total:,} parameters ({trainable / max(total, 1):.3%})"
    return f"training {share}; routers in {len(layers)} layers: {routers}"


def _angles_in_words(bases: Bases) -> str:
    if isinstance(bases, dict):
        return "; ".join(f"{_angles_in_words(values)} in layers of type {kind}" for kind, values in bases.items())
    return f"{bases[0]:.12g} times {', '.join(f'{base / bases[0]:.4g}' for base in bases)}"
