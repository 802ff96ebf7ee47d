"""Our place in transformers' attention interface.

An attention module looks its attention function up by the name in `self.config._attn_implementation` and hands its
keyword arguments on to it. So a wrapped module gets a stand-in for its config that names our function, and the mixture
of one forward pass travels to it as a keyword argument: no forward is copied and no transformers module is patched.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from ..rope import RotationTable
from ..rope.positions import Positions, caches_among, packed_query_start
from ..rope.turned_keys import TurnedKeys
from .call import Attend, AttentionCall
from .operator import compute

ATTENTION_NAME = "moice"
KEYWORD = "moice"
"""The keyword argument under which an attention module passes the mixture on."""
_PACKED = "write_index"
"""An option of attention functions that continuous batching alone gives: where to write the cache."""
_CONFIG = "config"
"""Where an attention module has its config. By name, because to type checkers attributes of modules are tensors."""


class _InterceptedConfig:
    """The config of an intercepted attention module: that of the model, but for the name of the attention function.

    Whatever else is read comes from the model's config as it is now, and whatever is assigned goes to it.

    Attributes:
        _moice_own: the model's own config, read at call time, so that `set_attn_implementation` keeps working.
        _moice_interface: the modeling file's interface, which may override functions locally.
        _moice_eager: the modeling file's eager attention.
    """

    _attn_implementation = ATTENTION_NAME
    _moice_own: PreTrainedConfig
    _moice_interface: AttentionInterface
    _moice_eager: Attend | None

    def __init__(self, own: PreTrainedConfig, interface: AttentionInterface, eager: Attend | None):
        vars(self).update(_moice_own=own, _moice_interface=interface, _moice_eager=eager)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for special methods before there is a config.
        if name.startswith(("__", "_moice_")):
            raise AttributeError(name)
        return getattr(self._moice_own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._moice_own, name, value)


class _AttentionView:
    """An attention module with the model's own config, for attention functions that read `module.config`."""

    def __init__(self, module: nn.Module, config: PreTrainedConfig):
        self.module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass
class MixtureCall:
    """What one forward pass of one layer asks of the attention function.

    Attributes:
        gate: maps queries `[B, H, S, D]` to gates `[B, H, S, N]`, a mask of the picked experts (or None), and records
            of what was decided.
        rotations: further rotations of the N experts.
        positions: where queries and keys stand.
        top_k: the most experts that a row picks.
        implementation: name of the operator's implementation.
        rows: for each expert the queries that may pick it, where that is known.
        turned: keys that earlier passes left turned in the cache, or None.
        records: those of `gate`; None until it was asked.
    """

    gate: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None, list[Any]]]
    rotations: RotationTable
    positions: Positions
    top_k: int | None = None
    implementation: str = "auto"
    rows: tuple[slice, ...] | None = None
    turned: TurnedKeys | None = None
    records: list[Any] | None = None

    def attend(
        self,
        attend: Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        backend: str | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the mixture in place of `attend`, the model's own attention, which `backend` names."""
        implementation = self.implementation
        places: tuple[int | torch.Tensor, torch.Tensor | None, torch.Tensor | None]
        if _PACKED in options:
            places = packed_query_start(options["cu_seq_lens_q"], options["cu_seq_lens_k"], query, key), None, None
            implementation = _implementation_for_packed(implementation)
        else:
            places = self.positions.among_keys(query.shape[-2], key.shape[-2])
        turned = self.turned
        if places[1] is not None or (turned is not None and not turned.are_of(self.positions, key)):
            turned = None
        # Under autocast, rotated queries and keys may be in float32 and values in half precision.
        if not query.dtype == key.dtype == value.dtype:
            dtype = functools.reduce(torch.promote_types, (query.dtype, key.dtype, value.dtype))
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        gates, picked, self.records = self.gate(query)
        tensors = (query, key, value, gates, self.rotations)
        call = AttentionCall(
            *tensors, *places, attend, attention_mask, picked, backend, self.top_k, options, self.rows, turned
        )
        return compute(call, implementation)


def moice_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    moice: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function that transformers' attention interface knows as `"moice"`.

    With a `moice` keyword (a [`MixtureCall`] or anything with its `attend` method) it computes that; without one it is
    the model's own attention.
    """
    intercepted: Any = module.config
    config = intercepted._moice_own
    name = config._attn_implementation

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Without an eager function in the modeling file, transformers finds only what the interface itself holds.
        function: Attend = intercepted._moice_interface.get_interface(name, intercepted._moice_eager)
        return function(_AttentionView(module, config), q, k, v, mask, **options)

    if moice is None:
        return attend(query, key, value, attention_mask, **kwargs)
    if kwargs.get("is_causal") is None and not getattr(module, "is_causal", True):
        # Attention functions read it from the module, the operator's implementations from the arguments.
        kwargs["is_causal"] = False
    if _PACKED in kwargs:
        key, value = _write_once(module, key, value, kwargs)
    output: tuple[torch.Tensor, torch.Tensor | None]
    output = moice.attend(attend, query, key, value, attention_mask, backend=name, **kwargs)
    return output


def _implementation_for_packed(name: str) -> str:
    if name not in ("auto", "delegated", "reference"):
        raise ValueError(f"`implementation` is {name!r}, which does not run in continuous batching; choose 'auto'.")
    return "delegated" if name == "auto" else name


class _WrittenCache:
    """Stands in for a paged cache that has taken up this pass's keys and values already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def _write_once(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let continuous batching's cache take up keys and values, and return all keys and values of its sequences.

    Up to transformers 5.23 it is the attention function that writes this cache, so a mixture, which may call the
    function once per expert, has to write it before. Later the attention module does, and no cache arrives here.
    """
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "MoICE has to see the keys of continuous batching, which stay in the cache when decoding uses block "
            "tables. Pass `ContinuousBatchingConfig(max_blocks_per_request=0)` as `continuous_batching_config`."
        )
    cache = caches_among((), kwargs)[1]
    if cache is not None:
        update: Callable[..., tuple[torch.Tensor, torch.Tensor]] = cache.update
        if "kwargs" not in inspect.signature(update).parameters:
            raise ValueError(
                f"MoICE cannot write the cache of continuous batching in transformers {transformers.__version__}. "
                "Upgrade it to 5.19 or later, or use `generate`."
            )
        key, value = update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        kwargs["cache"] = _WrittenCache()
    return key, value


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' attention interface."""
    forward = _own_forward(module)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _own_forward(module: nn.Module) -> FunctionType:
    """The forward that the modeling file defines, below decorators."""
    forward: FunctionType = inspect.unwrap(type(module).forward)
    return forward


def intercept(module: nn.Module) -> None:
    """Make an attention module call our function. Undone by [`restore`]; the config object itself is not touched."""
    config = getattr(module, _CONFIG)
    if not isinstance(config, _InterceptedConfig):
        names = _own_forward(module).__globals__
        stand_in = _InterceptedConfig(config, names["ALL_ATTENTION_FUNCTIONS"], names.get("eager_attention_forward"))
        setattr(module, _CONFIG, stand_in)


def own_config(module: nn.Module) -> PreTrainedConfig:
    """The model's own config of an attention module, intercepted or not."""
    config = getattr(module, _CONFIG)
    own: PreTrainedConfig = config._moice_own if isinstance(config, _InterceptedConfig) else config
    return own


def exchange_config(module: nn.Module, config: PreTrainedConfig) -> None:
    """Give a module another config of its own, whether it is intercepted or not."""
    if isinstance(module.config, _InterceptedConfig):
        vars(module.config)["_moice_own"] = config
    else:
        setattr(module, _CONFIG, config)


def bypassed(what: str) -> RuntimeError:
    """The error for a pass that would silently have been the base model's; `what` says where."""
    return RuntimeError(
        f"{what}, so the result would silently be the base model's. The code that computes attention was exchanged "
        f"after the adapter was added, or transformers {transformers.__version__} does it in a way that peft_moice "
        "does not know: install a version that docs/versions.md names, or use `disable_adapter()`."
    )


def restore(module: nn.Module) -> None:
    """Give the module its own config object back."""
    setattr(module, _CONFIG, own_config(module))
