"""Finds attention modules, and learns by running them how their rotary embedding acts."""

from .attention_modules import attention_module_names, explain_no_targets, explain_target
from .probe import LayerPlan, LayerProbe
from .running import UnsupportedLayerError

__all__ = [
    "LayerPlan",
    "LayerProbe",
    "UnsupportedLayerError",
    "attention_module_names",
    "explain_no_targets",
    "explain_target",
]
