"""Modules that are trained and saved with an adapter, where they lie inside adapted attention modules.

PEFT takes every module whose name ends in one of `modules_to_save`, but refuses children of what a tuner has wrapped:
"norm" means the `q_norm` and `k_norm` of a wrapped attention module, too. So the config names what lies inside in
full, by names that PEFT does not find behind the wrapper, and such modules are wrapped here.
"""

from collections.abc import Iterable

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import MoICEConfig

_WRAPPED = ".base_layer"


def resolve_modules_to_save(
    config: MoICEConfig, model: nn.Module, attention_names: Iterable[str], adapter_name: str
) -> None:
    """Name in full what `config.modules_to_save` means where it reaches into adapted attention modules.

    Args:
        config: changed in place, if one of its names reaches into one.
        model: the model, adapted or not.
        attention_names: names of the modules to be adapted, without those of wrappers.
        adapter_name: name of the adapter to be added.

    Raises:
        ValueError: a name means an attention module that is to be adapted, or what MoICE adds to it.
    """
    if not config.modules_to_save:
        return
    attention_names = list(attention_names)
    names = [_plain(name) for name, _ in model.named_modules() if name]
    resolved: list[str] = []
    for entry in config.modules_to_save:
        for attention in attention_names:
            added = ("", _WRAPPED, ".moice_router", f".moice_router.{adapter_name}")
            if any(f"{attention}{part}".endswith(entry) for part in added):
                raise ValueError(
                    f"`modules_to_save` holds {entry!r}, which also means the adapted attention module "
                    f"{attention!r} or a part that MoICE adds to it, because PEFT takes every module whose name ends "
                    "so. Write more of the name, or leave the attention module out with `exclude_modules`."
                )
        meant = [name for name in names if name.endswith(entry)]
        inside = any(name.startswith(f"{attention}.") for name in meant for attention in attention_names)
        resolved += meant if inside else [entry]
    if resolved != config.modules_to_save:
        config.modules_to_save = list(dict.fromkeys(resolved))


def save_inside_attention(model: nn.Module, config: MoICEConfig, adapter_name: str, is_active: bool) -> None:
    """Wrap those of the adapter's `modules_to_save` that lie inside wrapped attention modules.

    Args:
        model: the model, whose attention modules are wrapped.
        config: the adapter's, with its names resolved by [`resolve_modules_to_save`].
        adapter_name: the adapter's name.
        is_active: whether it is to be used and trained from now on.
    """
    meant = set(config.modules_to_save or ())
    inside = [name for name, _ in model.named_modules() if f"{_WRAPPED}." in name and _plain(name) in meant]
    for name in inside:
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name)  # type: ignore[no-untyped-call]
            active = module.active_adapter
        else:
            parent, _, child = name.rpartition(".")
            module = ModulesToSaveWrapper(module, adapter_name)  # type: ignore[no-untyped-call]
            setattr(model.get_submodule(parent), child, module)
            active = adapter_name if is_active else []
        module.set_adapter(active, inference_mode=config.inference_mode)


def _plain(name: str) -> str:
    """The name that a module has where nothing is wrapped."""
    return name.replace(f"{_WRAPPED}.", ".").removesuffix(_WRAPPED)
