"""How vLLM reads the config of a merged model: as that of its family, with the routers' description beside it."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm.transformers_utils.config import get_config_parser
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from .folder import check_files, refuse_adapter
from .refusals import refuse_other_classes, refuse_unserved

ARCHITECTURES = ("MoICEForCausalLM", "MoICEMoEForCausalLM")
"""Classes of `model.py` that run merged models, and the names by which vLLM finds them."""

_Parser: Any = type(get_config_parser("hf"))


class MoICEConfigParser(_Parser):
    """The parser of transformers' configs that vLLM has, or another plugin put there; other models are left to it."""

    def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], PreTrainedConfig]:
        """Read a config; that of a merged model becomes one of its family, see [`as_family_config`].

        Raises:
            ValueError: the model cannot be served; says why.
        """
        is_folder = os.path.isdir(model)
        if is_folder:
            refuse_adapter(Path(model))
        config_dict, config = super().parse(model, *args, **kwargs)
        if hasattr(type(config), "original_class"):
            refuse_other_classes(config)
            refuse_unserved(config)
            if is_folder:
                check_files(Path(model))
            as_family_config(config)
        return config_dict, config


def as_family_config(config: Any) -> None:
    """Turn the config of a merged model into that of its base, in place; `moice` stays, and names our architecture.

    vLLM decides by the model type how lengths, heads and dtypes are read, so it has to see the family's.
    """
    original = type(config).original_class
    for name in ("model_type", "auto_map"):
        vars(config).pop(name, None)
    config.__class__ = original
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    is_moe = convertor(config, config.get_text_config()).get_num_experts() > 0
    config.architectures = [ARCHITECTURES[is_moe]]
