"""All or nothing: what raises leaves the model, its adapters and their configs as they were."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

_covered: ContextVar[frozenset[int]] = ContextVar("covered", default=frozenset())
"""Identities of the modules and configs that blocks around the current one put back."""


@contextmanager
def restored_on_error(model: nn.Module, *configs: object) -> Iterator[None]:
    """If the block raises, put `model`, the configs that hang on it, and `configs` back to what they were.

    That covers the modules of `model` with their classes, attributes, hooks and flags. Values of tensors are left as
    they are, so the block has to write new tensors rather than into old ones. Inside of another such block, nothing
    is done for what that one puts back, so its errors have to reach that one.
    """
    around = _covered.get()
    # A tuner that was made inside of the block around goes with it; the model that it was made for is covered.
    parts = [model] if id(model) in around else list(model.children())
    if parts and around.issuperset(map(id, (*parts, *configs))):
        yield
        return
    modules = list(model.modules())
    saved = _snapshot(modules, configs)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    token = _covered.set(around.union(map(id, (*modules, *configs))))
    try:
        yield
    except BaseException:
        for item, item_class, containers in saved:
            if type(item) is not item_class:
                item.__class__ = item_class
            for container, content in containers:
                # In place, because handles of hooks and other modules refer to these containers.
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        raise
    finally:
        _covered.reset(token)


def all_or_nothing(verb: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Decorate a method of a module to run within [`restored_on_error`]."""

    @functools.wraps(verb)
    def wrapper(module: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with restored_on_error(module):
            return verb(module, *args, **kwargs)

    return wrapper


def _snapshot(modules: list[nn.Module], configs: tuple[object, ...]) -> list[tuple[Any, type, list[tuple[Any, Any]]]]:
    """Modules, `configs` and the configs that hang on the modules, each with its class and a copy of its containers.

    Containers are the attributes themselves, and every dict, list and set among them.
    """
    objects: dict[int, object] = {id(item): item for item in (*modules, *configs)}
    for module in modules:
        attributes = vars(module)
        adapters = attributes.get("peft_config")
        for config in (attributes.get("config"), *(adapters.values() if isinstance(adapters, dict) else ())):
            if hasattr(config, "__dict__"):
                objects.setdefault(id(config), config)
    saved = []
    for item in objects.values():
        containers: list[Any] = [vars(item)]
        for value in vars(item).values():
            if isinstance(value, (dict, list, set)):
                containers.append(value)
        saved.append((item, type(item), [(container, container.copy()) for container in containers]))
    return saved
