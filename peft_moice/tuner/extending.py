"""Longer windows: ropes by position and distance for models whose window is too short, without training."""

from typing import Any, Literal

from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .config import MoICEConfig
from .model import MoICEModel

NEAR = 0.75
"""Share of the window within which keys keep the model's own angles."""


By = Literal["distance", "position"]


def extend(
    model: nn.Module,
    factor: float | None = None,
    *,
    near: int | None = None,
    by: By = "distance",
    adapter_name: str | None = None,
) -> PeftModel:
    """Let a model read texts of `factor` times its window, without training and without a change within the window.

    Queries within the window compute what they did, bit for bit. Those beyond see keys nearer than `near` under the
    model's own angles; for keys farther away, angles go on more slowly from there (Self-Extend, Jin et al., ICML 2024,
    without its floors), so that no angle leaves what the model was trained on. With `by="position"` they see all keys
    under YaRN (Peng et al., ICLR 2024), which vLLM serves as well.

    Models whose own rope is longrope (Phi) have factors for longer texts already: queries below the original length
    then have the short ones, later ones the long ones, over one cache, so that sequences may grow across it.

    Args:
        model: a model, or a `PeftModel` with MoICE adapters, next to which the extension becomes active: their routers
            then decide within the window. Adapters of another tuner, such as LoRA, stay in effect below it.
        factor: the new length as a multiple of the window, above 1. It costs nothing within. Default: 4; to be left
            out, as `near` and `by`, for longrope.
        near: distance in tokens, for `by="distance"`. Default: three quarters of the window.
        by: what changes the ropes of queries beyond the window: the "distance" of the key, or their "position" alone.
        adapter_name: name of the adapter. Default: "default", beside other adapters of MoICE "extension".

    Returns:
        The `PeftModel`.

    Raises:
        ValueError: `factor`, `near` or `by` out of range; a model that has no window of its own, or cannot be adapted.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = extension_config(base.config, factor, near=near, by=by)
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, MoICEModel):
        config.task_type = TaskType.CAUSAL_LM if isinstance(base, PreTrainedModel) and base.can_generate() else None
        return get_peft_model(model, config, adapter_name=adapter_name or "default")
    active, adapter_name = model.active_adapters, adapter_name or "extension"
    model.add_adapter(adapter_name, config)
    tuner: Any = model.base_model
    tuner.set_adapter([*active, adapter_name])
    return model


def extension_config(
    config: Any, factor: float | None = None, *, near: int | None = None, by: By = "distance"
) -> MoICEConfig:
    """The adapter that [`extend`] adds, from a model's config alone.

    Args:
        config: the model's config.
        factor, near, by: see [`extend`].

    Raises:
        ValueError: see [`extend`].
    """
    longrope = _longrope_of(config)
    if longrope is not None:
        if factor is not None or near is not None or by != "distance":
            raise ValueError(
                f"`factor` is {factor!r}, `near` {near!r} and `by` {by!r}, but the model's own rope is 'longrope', "
                "whose long factors say how far it reaches. Leave them out."
            )
        return _of_longrope(*longrope)
    factor, window = 4.0 if factor is None else factor, window_of(config)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor <= 1024:
        raise ValueError(f"`factor` is {factor!r}, but has to be a number above 1, such as 4, and at most 1024.")
    length = int(factor * window)
    within, beyond = {"query_positions": [0, window]}, {"query_positions": [window, length]}
    if by == "position":
        if near is not None:
            raise ValueError(f'`near` is {near!r}, a distance, but the ropes change by "position". Leave one out.')
        yarn = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": window}
        return MoICEConfig(ropes=[within, {**beyond, **yarn}], task_type=TaskType.CAUSAL_LM)
    if by != "distance":
        raise ValueError(f'`by` is {by!r}, but has to be "distance" or "position".')
    near = int(NEAR * window) if near is None else near
    if isinstance(near, bool) or not isinstance(near, int) or not 0 < near < window:
        raise ValueError(
            f"`near` is {near!r}, but has to be an integer from 1 to {window - 1}: the model's window is {window} "
            "tokens, and keys farther away than that need other angles."
        )
    far = {"rope_type": "linear", "factor": (length - near) / (window - near)}
    ropes: list[dict[str, Any]] = [
        within,
        {**beyond, "distances": [0, near]},
        {**beyond, "distances": [near, None], **far},
    ]
    return MoICEConfig(ropes=ropes, task_type=TaskType.CAUSAL_LM)


def _of_longrope(window: int, length: int) -> MoICEConfig:
    beyond = [window, length if length > window else None]
    ropes: list[dict[str, Any]] = [
        {"query_positions": [0, window]},
        {"query_positions": beyond, "rope_type": "longrope"},
    ]
    return MoICEConfig(ropes=ropes, task_type=TaskType.CAUSAL_LM)


def _ropes_in(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of a model, by layer type where it has several."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _longrope_of(config: Any) -> tuple[int, int] | None:
    """Where a model's rope is longrope, the number of tokens for its short factors, and for its long ones."""
    lengths = {
        int(rope["original_max_position_embeddings"])
        for rope in _ropes_in(config)
        if rope.get("rope_type") == "longrope"
    }
    if len(lengths) != 1:
        return None
    return lengths.pop(), int(config.get_text_config(decoder=True).max_position_embeddings)


def window_of(config: Any) -> int:
    """The number of tokens that a model was trained for; with longrope, that its short factors were trained for.

    Raises:
        ValueError: its config does not say, or its rope has been changed for longer texts already.
    """
    longrope = _longrope_of(config)
    if longrope is not None:
        return longrope[0]
    text: Any = config.get_text_config(decoder=True)
    types = sorted({kind.get("rope_type", "default") for kind in _ropes_in(config)} - {"default"})
    if types and types != ["llama3"]:
        raise ValueError(
            f"The model's own rope is {types}, which serves longer texts already. Write the rules that you want "
            "yourself, as `MoICEConfig(ropes=...)`: docs/window.md has those that give such a model its short texts "
            "back."
        )
    window = getattr(text, "max_position_embeddings", None)
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"The config of the model has `max_position_embeddings` {window!r}, which is no window.")
    return window
