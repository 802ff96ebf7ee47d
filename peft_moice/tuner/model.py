"""`MoICEModel`: injects routers into a model's attention modules."""

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..attention import known_implementation
from ..rope.rotary_hooks import detach_rotary_hooks
from ..routing.mixture import watch_positions
from ..standalone.built_in import BuiltInRouters
from ..standalone.models import make_standalone
from ..training import register_hooks, remove_hooks
from .beside_routers import check_stored_beside, fields_beside
from .combining import Combination, combine_routers, combined_config
from .config import MoICEConfig, as_moice_config
from .layer import BASE_MODEL_NAME, MoICELayer
from .loading import check_stored_routers, discard_if_never_loaded
from .planning import plan_layers
from .rollback import all_or_nothing, restored_on_error
from .stacking import base_of, layer_places, other_tuner_layers
from .targets import is_target

logger = logging.getLogger(__name__)

_OWN_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")


class MoICEModel(BaseTuner):
    """Makes every attention head of a RoPE model mix several base angles, chosen by routers (paper, section 3).

    Usually created by `peft.get_peft_model(model, MoICEConfig())`.

    Args:
        model: a transformers decoder whose attention goes through transformers' attention interface.
        peft_config: the adapter's [`MoICEConfig`].
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the routers on the meta device, to be filled by loading. Default: False.
        state_dict: see PEFT's `BaseTuner`. Default: None.

    Raises:
        ValueError: no module matches, or one that cannot be supported does, or angles that do not fit the model.
    """

    prefix = "moice_"
    tuner_layer_cls = MoICELayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        if isinstance(model, PeftModel) and isinstance(model.base_model, MoICEModel):
            raise ValueError(
                "The model has MoICE adapters already. Add another with `model.add_adapter(name, config)`."
            )
        model = base_of(model)
        configs = peft_config.values() if isinstance(peft_config, dict) else [peft_config]
        with restored_on_error(model, *configs):
            if hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False):
                # Another tuner's record, which PEFT would extend in place; an equal adapter name would replace its
                # config. (transformers' own `add_adapter` keeps the adapters of all tuners in one record, under
                # distinct names.)
                del model.peft_config
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        # Trainers that merge, copy the weights into an engine for inference and unmerge leave out what carries this
        # prefix, as contained in the merged weights. Merged routers are weights of their own, and have to arrive.
        self.prefix = "moice_router."

    @all_or_nothing
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the routers of `adapter_name` to the targeted modules. Called by PEFT, see its `BaseTuner`."""
        if hasattr(getattr(model, "config", None), "moice"):
            raise ValueError(
                f"{type(model).__name__} has routers built in already. Put an adapter on the base model that it was "
                "merged from."
            )
        config = as_moice_config(self.peft_config[adapter_name])
        if not config.awaits_weights and any(adapter_name in layer.moice_router for layer in self._layers()):
            raise ValueError(
                f"The model has routers of an adapter called {adapter_name!r} already, which new ones would replace. "
                "Go on with the `PeftModel` that `get_peft_model` returned; add another adapter to it with "
                "`add_adapter(name, config)`; take all of them out with its `unload()`; or replace them by saved ones "
                "with `PeftModel.from_pretrained(model, folder)`."
            )
        self._kept_out: list[tuple[nn.Module, str, nn.Module]] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._plan_of
        for parent, child_name, layer in self._kept_out:
            setattr(parent, child_name, layer)
        del self._kept_out
        stored = config.stored_beside if config.awaits_weights else None
        if stored is not None and stored.names is not None and stored.fields == fields_beside(config):
            check_stored_beside(model, adapter_name, stored.names)
        # Not in `_post_injection_hook`, which PEFT does not call for later adapters.
        register_hooks(model)
        watch_positions(model)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        for name in self.peft_config:
            # Routers are kept in a ModuleDict, which cannot hold these.
            if not name or "." in name or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"An adapter cannot be called {name!r}: PyTorch has no place for a module of that name. Choose a "
                    "name without dots that is not an attribute of torch.nn.ModuleDict."
                )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> MoICEConfig:
        config = as_moice_config(peft_config)
        config.implementation = known_implementation(config.implementation)
        if config.members is not None:
            return config
        if config.hidden_act is None:
            names = [model_config.get(name) for name in _OWN_ACTIVATION_FIELDS]
            names += [(model_config.get("text_config") or {}).get(name) for name in _OWN_ACTIVATION_FIELDS]
            config.hidden_act = next((name for name in names if isinstance(name, str)), "silu")
        if config.top_k is None:
            config.top_k = config.num_experts
        if config.router_dim is None:
            config.router_dim = config.num_experts
        if config.top_k == config.num_experts > 1 and (config.router_aux_loss_coef or 0) > 0:
            logger.info(
                "top_k equals the number of angles (%d), so the balance loss is a constant without gradient: it is "
                "reported, but not added to the loss.",
                config.num_experts,
            )
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        self._plan_of = plan_layers(as_moice_config(peft_config), model)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        return is_target(as_moice_config(peft_config), key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = as_moice_config(peft_config)
        plan = self._plan_of(current_key)
        if plan.rope is None:
            return
        if isinstance(target, MoICELayer):
            target.update_layer(adapter_name, config)
            return
        new_module = MoICELayer(target, plan.rope, plan.num_heads, plan.head_dim)
        new_module.set_adapter(self.active_adapters)
        new_module.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        self._kept_out.append((parent, child_name, new_module))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        # Hereafter PEFT looks for `modules_to_save`, and refuses those inside of a tuner's layers, such as the norms
        # in an attention module. So our layers, new and old, come into their places at the end of `inject_adapter`.
        for layer, (parent, child_name) in layer_places(model).items():
            setattr(parent, child_name, layer.base_layer)
            self._kept_out.append((parent, child_name, layer))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let every row of a batch run under the adapter that `adapter_names` gives it. Entered by PEFT."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`, or "
                "train one adapter at a time with `set_adapter`."
            )
        self._check_adapters_exist([name for name in adapter_names if name != BASE_MODEL_NAME])
        # `generate` repeats every row of the batch in place, for its beams or for several texts.
        options = {**vars(kwargs.get("generation_config") or GenerationConfig()), **kwargs}
        repeats = max(options.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        rows = [name for name in adapter_names for _ in range(repeats)]
        # Other threads may run batches of their own through the same modules.
        hook = partial(_pass_adapter_names, adapter_names=rows, thread=threading.get_ident())
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (MoICELayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Several active adapters average their mixtures.

        Args:
            adapter_name: name or names of adapters.
            inference_mode: leave their routers frozen. Default: False.

        Raises:
            ValueError: an adapter does not exist.
        """
        self._check_adapters_exist([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the routers of `adapter_names`, or freeze them with `requires_grad=False`.

        Raises:
            ValueError: an adapter does not exist.
        """
        self._check_adapters_exist([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    @all_or_nothing
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others.

        Args:
            adapters: names of the adapters to combine.
            weights: one weight per adapter.
            adapter_name: name of the new adapter. It is not activated.
            combination_type: "cat" (default) keeps all routers, and mixes as the weighted mean of the adapters'
                mixtures, exactly; the weights have to be positive and sum to one. "linear", "ties", "dare_linear",
                "dare_ties" and "magnitude_prune" combine router weights as PEFT does for LoRA, and need adapters with
                the same angles and the same router shape.
            density: share of values kept, in (0, 1]; needed by the types that prune.
            majority_sign_method: "total" (default) or "frequency", for "ties" and "dare_ties".

        Raises:
            ValueError: unknown or existing names, weights or adapters that do not fit the type.
        """
        self._check_adapters_exist(adapters)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter called {adapter_name!r} already. Delete it or choose another name.")
        configs = [as_moice_config(self.peft_config[name]) for name in adapters]
        combination = Combination(adapters, weights, combination_type, density, majority_sign_method)
        config = combined_config(combination, configs)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in self._layers():
            if adapter_name in layer.moice_router:
                combine_routers(layer, adapter_name, combination)

    @all_or_nothing
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Build routers into the attention modules, reversibly: outputs stay as they are.

        Args:
            adapter_names: adapters to merge. Default: the active ones.
            safe_merge: refuse routers with values that are not finite.

        Raises:
            ValueError: unknown adapters, or values that are not finite with `safe_merge`.
        """
        self._check_adapters_exist(adapter_names or [])
        for layer in self._layers():
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Undo [`merge_adapter`]."""
        layers = self._layers()
        if not any(layer.merged for layer in layers):
            warnings.warn("No adapter is merged. Nothing to do.", stacklevel=2)
        for layer in layers:
            layer.unmerge()

    @all_or_nothing
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Build routers into the model and return it without PEFT's objects.

        The result is a transformers model of a class of its own (`MoICELlamaForCausalLM`, ...) that computes what the
        adapted model computed. Its `save_pretrained` writes a checkpoint that `from_pretrained` reads after
        `import peft_moice`. The base model is changed in place.

        Args:
            progressbar: show progress. Default: False.
            safe_merge: refuse routers with values that are not finite. Default: False.
            adapter_names: adapters to merge. Default: the active ones.

        Raises:
            ValueError: unknown adapters, other tuners' adapters left in the model, or values that are not finite with
                `safe_merge`.
        """
        self._check_adapters_exist(adapter_names or [])
        others = other_tuner_layers(self.model)
        if others:
            raise ValueError(
                f"The model still holds {len(others)} layers of another tuner ({type(others[0]).__module__}), so it "
                "cannot become a plain transformers model. Unload MoICE with `unload()`, merge the other adapter "
                "first, and then load MoICE again and merge it."
            )
        model = self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)
        if isinstance(model, PreTrainedModel) and any(
            isinstance(module, BuiltInRouters) for module in model.modules()
        ):
            make_standalone(model)
            register_hooks(model)
            watch_positions(model)
        return model

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's returns the model, whatever it says
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # PEFT's version would also unload the layers of other tuners, such as LoRA below our layers. What lies inside
        # an attention module comes before it, because its name changes with it.
        targets = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, (MoICELayer, AuxiliaryTrainingWrapper))
        ][::-1]
        action = "Merging" if merge else "Unloading"
        for name, module in tqdm(targets, disable=not progressbar, desc=f"{action} MoICE"):
            parent_name, _, child_name = name.rpartition(".")
            with onload_layer(module):
                unloaded = module.unload_and_optionally_merge_module(
                    merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                )
            setattr(self.model.get_submodule(parent_name), child_name, unloaded)
        remove_hooks(self.model)
        detach_rotary_hooks(self.model)
        if merge:
            # No layers of a tuner are left; what else PEFT does is to untie embeddings that have become different.
            super()._unload_and_optionally_merge(merge=True)
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config
        model: nn.Module = self.model
        return model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT's version would also switch the layers of other tuners.
        for module in self.model.modules():
            if isinstance(module, (MoICELayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(enabled)

    def _layers(self) -> list[MoICELayer]:
        return [module for module in self.model.modules() if isinstance(module, MoICELayer)]

    def _check_adapters_exist(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There is no adapter {unknown[0]!r}; this model has {sorted(self.peft_config)}.")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # PEFT's version would also take in the layers of other tuners whose adapter has the same name.
        others = other_tuner_layers(model)
        if others:
            warnings.warn(
                f"Only MoICE routers are saved; the model's {len(others)} layers of another tuner "
                f"({type(others[0]).__module__}) are not. Save them with `with peft_moice.unwrapped(model): "
                "other_model.save_pretrained(...)`.",
                stacklevel=2,
            )
        return {key: value for key, value in state_dict.items() if f".moice_router.{adapter_name}." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's version expects the adapter's name next to last; the routers of a mean of adapters lie deeper.
        return key.replace(f".moice_router.{adapter_name}.", ".moice_router.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_stored_routers(model, adapter_name, state_dict)
        except ValueError:
            discard_if_never_loaded(model, adapter_name)
            raise
        as_moice_config(config).awaits_weights = False
        return state_dict


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str], thread: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.compiler.is_compiling() or threading.get_ident() == thread:
        kwargs["adapter_names"] = adapter_names
    return args, kwargs
