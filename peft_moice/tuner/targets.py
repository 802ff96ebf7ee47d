"""Whether a config targets a module."""

import copy
import re

from peft.tuners.tuners_utils import check_target_module_exists

from .config import MoICEConfig


def is_target(config: MoICEConfig, name: str) -> bool | re.Match[str] | None:
    """As PEFT's `check_target_module_exists`, but `layers_to_transform` holds for every target.

    PEFT takes targets that are written out in full whatever layer they lie in, and finds no index in names that begin
    with the list of layers, as those of a model without a head do.
    """
    found = check_target_module_exists(config, name)
    if found and config.layers_to_transform is not None:
        without_exclusions = copy.copy(config)
        without_exclusions.exclude_modules = None
        return check_target_module_exists(without_exclusions, f"model.{name}")
    return found
