"""Makes the config.json of a model with routers built in unreadable to classes that would leave the routers out.

transformers lets the family's own class read a config of another model type, with a notice, if it finds no better one.
So the file holds, for every class that might, a config that raises: under a key of its own for the family's, and in
the configs that a model is composed of for theirs. Everything else in the file is as the family writes it.
"""

from typing import Any

_KEY = "sealed"
_FIELD = "id2label"
"""What all configs convert as they are made, whatever a caller overrides: its keys have to be numbers."""
# Python shows 200 characters of what is no number.
_NOTICE = (
    "this model has MoICE routers, which this class would leave out. `import peft_moice`, and load the model with an "
    "auto class, such as AutoModelForCausalLM"
)


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """The config `fields`, in JSON's types, as they are written. Undone by [`unsealed`]."""
    parts = {name: _with_notice(part) for name, part in fields.items() if _is_config(part)}
    return {**fields, **parts, _KEY: _with_notice({"model_type": fields["base_model_type"]})}


def unsealed(fields: dict[str, Any]) -> dict[str, Any]:
    """What [`sealed`] was given. Other configs stay as they are."""
    return {name: _without_notice(part) if _is_config(part) else part for name, part in fields.items() if name != _KEY}


def _with_notice(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, _FIELD: {**(config.get(_FIELD) or {}), _NOTICE: ""}}


def _without_notice(config: dict[str, Any]) -> dict[str, Any]:
    labels = {key: label for key, label in (config.get(_FIELD) or {}).items() if key != _NOTICE}
    others = {name: value for name, value in config.items() if name != _FIELD}
    return {**others, _FIELD: labels} if labels else others


def _is_config(part: object) -> bool:
    return isinstance(part, dict) and "model_type" in part
