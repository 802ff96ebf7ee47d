"""Models that are trained with routers from the beginning, all weights together."""

import dataclasses

from transformers import PreTrainedModel

from ..standalone.built_in import BuiltInRouters
from ..standalone.description import describe_routers
from .config import MoICEConfig
from .model import MoICEModel


def add_routers(model: PreTrainedModel, config: MoICEConfig) -> PreTrainedModel:
    """Build freshly initialized routers into `model` and leave everything trainable, routers and all other weights.

    What comes back is what merging an adapter gives, a standalone model such as `MoICELlamaForCausalLM`, except that
    training adds the balance loss with the coefficient of `config`, which the model's own config carries to disk and
    back.

    Args:
        model: a transformers decoder. Changed in place.
        config: which angles, how many of them per token, which routers, which modules.

    Raises:
        ValueError: the model or the angles cannot be served, see [`MoICEModel`].
    """
    wanted = dataclasses.replace(config)
    MoICEModel(model, wanted, "default").merge_and_unload()
    specs = wanted.router_specs()
    for module in model.modules():
        if isinstance(module, BuiltInRouters):
            for built_in, spec in zip(module.router_specs, specs, strict=True):
                built_in.router_aux_loss_coef = spec.router_aux_loss_coef
    model.config.moice = describe_routers(model)
    return model.requires_grad_(True)
