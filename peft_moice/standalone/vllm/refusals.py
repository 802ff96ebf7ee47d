"""What is not served, seen from a model's config."""

from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...rope.frequencies import original_length, rope_parameters
from ..description import read_description

_PREFIX = "MoICE"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ELSEWHERE = "Run it with transformers: `generate`, or `python -m peft_moice.standalone.transformers_server`"


def refuse_other_classes(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the model of `config`, a merged one, is not a causal language model."""
    architecture = (config.architectures or [""])[0]
    causal = {name for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(value)}
    if architecture.removeprefix(_PREFIX) not in causal:
        _refuse(f"its class is {architecture or 'not named in the config'!r}, and only causal language models are")


def refuse_unserved(config: PreTrainedConfig) -> None:
    """Raise a ValueError with the reason if vLLM would not compute a merged model as transformers does.

    Its `config` may be of its family, with the description of the routers, and may be damaged.
    """
    reason = _reason(config)
    if reason is not None:
        _refuse(reason)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"This model with MoICE routers is not served by vLLM: {reason}. {_ELSEWHERE}.")


def _reason(config: Any) -> str | None:
    if config.get_text_config() is not config:
        return "it takes more than text"
    _, layers, ropes = read_description(getattr(config, "moice", None))
    if any(expert.far is not None for expert in ropes):
        return (
            "it has ropes by the distance of keys, of which vLLM's attention knows nothing (it serves what "
            "`peft-moice extend --by position` writes)"
        )
    for name, layer in layers.items():
        layer.own_theta(config, name)
        parameters = rope_parameters(config, layer.layer_type)
        if original_length(config, layer.layer_type) is not None:
            return f"its rope type is {parameters['rope_type']!r}, whose angles change with the length of the text"
        if "mrope_section" in parameters:
            return "its positions have several dimensions (mRoPE)"
    if getattr(config, "kv_lora_rank", None) or any(layer.layout.start != 0 for layer in layers.values()):
        return "its keys and values are kept in a latent form"
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        return f"it has layers of type {', '.join(sorted(others))}, and attention has to be full or sliding"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers take keys and values from other layers"
    return None


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
