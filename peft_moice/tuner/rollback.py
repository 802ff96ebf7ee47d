"""All or nothing: what raises leaves the model, its adapters and their configs as they were."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


@contextmanager
def restored_on_error(model: nn.Module, *configs: object) -> Iterator[None]:
    """If the block raises, put `model`, the configs that hang on it, and `configs` back to what they were.

    That covers the modules of `model` with their classes, attributes, hooks and flags. Values of tensors are left as
    they are, so the block has to write new tensors rather than into old ones.
    """
    modules = list(model.modules())
    objects = {id(item): item for item in (*modules, *configs)}
    for module in modules:
        for config in (vars(module).get("config"), *_values(vars(module).get("peft_config"))):
            if hasattr(config, "__dict__"):
                objects.setdefault(id(config), config)
    saved = [(item, type(item), _copies(vars(item))) for item in objects.values()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for item, item_class, copies in saved:
            if type(item) is not item_class:
                item.__class__ = item_class
            for container, content in copies:
                # In place, because handles of hooks and other modules refer to these containers.
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        raise


def all_or_nothing(verb: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Decorate a method of a module to run within [`restored_on_error`]."""

    @functools.wraps(verb)
    def wrapper(module: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with restored_on_error(module):
            return verb(module, *args, **kwargs)

    return wrapper


def _copies(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every container among the attributes, and they themselves, each with a copy of its content."""
    containers = [attributes, *(value for value in attributes.values() if isinstance(value, (dict, list, set)))]
    return [(container, container.copy()) for container in containers]


def _values(mapping: object) -> list[object]:
    return list(mapping.values()) if isinstance(mapping, dict) else []
