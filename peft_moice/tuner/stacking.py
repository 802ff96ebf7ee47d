"""MoICE over another tuner, such as LoRA inside the attention modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import MoICELayer


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model below another tuner's `PeftModel`, whose adapters stay in it; other models as they are.

    Raises:
        ValueError: prompt learning, which puts tokens in front that have no place among the positions.
    """
    if not isinstance(model, PeftModel):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"MoICE cannot be put over {config.peft_type.value}: virtual tokens have no place among the positions "
            "that MoICE rotates. Use a tuner that works inside layers, such as LoRA."
        )
    return model.get_base_model()


def other_tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Layers of other tuners in `model`, without those by which `trainable_token_indices` trains tokens for us."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    own = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MoICELayer) and id(module) not in own
    ]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Take MoICE's layers out of `model` for a while.

    Other tuners then find its modules under the names that they have without MoICE: their adapters can be saved,
    loaded and added, and their checkpoints fit the plain base model.

    ```python
    with unwrapped(model):
        lora_model.save_pretrained("lora")
    ```
    """
    places = layer_places(model)
    for layer, (parent, child_name) in places.items():
        setattr(parent, child_name, layer.base_layer)
    try:
        yield model
    finally:
        for layer, (parent, child_name) in places.items():
            setattr(parent, child_name, layer)


def layer_places(model: nn.Module) -> dict[MoICELayer, tuple[nn.Module, str]]:
    """MoICE's layers in `model`, each with the module that holds it and its name there."""
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, MoICELayer):
            parent_name, _, child_name = name.rpartition(".")
            places[module] = (model.get_submodule(parent_name), child_name)
    return places
