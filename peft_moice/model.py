"""`MoICEModel`: injects routers into a model's attention modules."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .attention import IMPLEMENTATIONS
from .built_in import BuiltInRouters
from .checkpoint import check_stored_routers, discard_if_never_loaded
from .combining import combine_routers, combined_config
from .config import MoICEConfig
from .layer import BASE_MODEL_NAME, MoICELayer
from .mixture import watch_positions
from .probing import LayerPlan, LayerProbe, attention_module_names, explain_no_targets, is_target
from .rollback import all_or_nothing, restored_on_error
from .rope.rotary_hooks import detach_rotary_hooks
from .self_check import unwatch_first_pass, watch_first_pass
from .stacking import base_of, layer_places, other_tuner_layers
from .standalone import make_standalone
from .training import register_hooks, remove_hooks

logger = logging.getLogger(__name__)

_OWN_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")


class MoICEModel(BaseTuner):
    """Makes every attention head of a RoPE model mix several base angles, chosen by routers (paper, section 3).

    Usually created by `peft.get_peft_model(model, MoICEConfig())`.

    Args:
        model: a transformers decoder whose attention goes through transformers' attention interface.
        peft_config: the adapter's [`MoICEConfig`].
        adapter_name: name of the adapter. Default: "default".
        low_cpu_mem_usage: create the routers on the meta device, to be filled by loading.

    Raises:
        ValueError: no module matches, or one that cannot be supported does, or angles that do not fit the model.
    """

    prefix = "moice_"
    tuner_layer_cls = MoICELayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: MoICEConfig | dict[str, MoICEConfig],
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

    @all_or_nothing
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the routers of `adapter_name` to the targeted modules. Called by PEFT, see its `BaseTuner`."""
        if hasattr(getattr(model, "config", None), "moice"):
            raise ValueError(
                f"{type(model).__name__} has routers built in already. Put an adapter on the base model that it was "
                "merged from."
            )
        self._kept_out: list[tuple[nn.Module, str, nn.Module]] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parent, child_name, layer in self._kept_out:
            setattr(parent, child_name, layer)
        del self._kept_out
        # Not in `_post_injection_hook`, which PEFT does not call for later adapters.
        register_hooks(model)
        watch_positions(model)
        watch_first_pass(model)

    def _check_new_adapter_config(self, config: MoICEConfig) -> None:
        super()._check_new_adapter_config(config)
        for name in self.peft_config:
            # Routers are kept in a ModuleDict, which cannot hold these.
            if not name or "." in name or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"An adapter cannot be called {name!r}: PyTorch has no place for a module of that name. Choose a "
                    "name without dots that is not an attribute of torch.nn.ModuleDict."
                )

    def _prepare_adapter_config(self, peft_config: MoICEConfig, model_config: dict) -> MoICEConfig:
        if peft_config.implementation not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(
                f"`implementation` is {peft_config.implementation!r}; choose 'auto' or one of "
                f"{sorted(IMPLEMENTATIONS)}."
            )
        if peft_config.members is not None:
            return peft_config
        if peft_config.hidden_act is None:
            names = [model_config.get(name) for name in _OWN_ACTIVATION_FIELDS]
            names += [(model_config.get("text_config") or {}).get(name) for name in _OWN_ACTIVATION_FIELDS]
            peft_config.hidden_act = next((name for name in names if isinstance(name, str)), "silu")
        if peft_config.top_k is None:
            peft_config.top_k = peft_config.num_experts
        if peft_config.router_dim is None:
            peft_config.router_dim = peft_config.num_experts
        if peft_config.top_k == peft_config.num_experts > 1 and peft_config.router_aux_loss_coef > 0:
            logger.info(
                "top_k equals the number of angles (%d), so the balance loss is a constant without gradient: it is "
                "reported, but not added to the loss.",
                peft_config.num_experts,
            )
        return peft_config

    def _prepare_model(self, peft_config: MoICEConfig, model: nn.Module) -> None:
        """Probe the targeted layers and resolve what the config leaves open, before anything is replaced."""
        _check_heads_are_here(peft_config, model)
        self._plans: dict[str, LayerPlan] = {}
        self._probe = LayerProbe(model)
        if peft_config.target_modules is None:
            self._choose_targets(peft_config, model)
        names = _targeted(peft_config, model)
        self._check_layers_to_transform(peft_config, names)
        for name in names:
            _check_not_on_disk(model, name)
        without_rope = [name for name in names if self._plan_of(model, name).rope is None]
        if without_rope:
            logger.info("MoICE leaves out %d attention modules without a rotary embedding.", len(without_rope))
        if names and len(without_rope) == len(names):
            raise ValueError(
                f"None of the targeted modules has a rotary embedding: {without_rope[:3]} ... MoICE works on models "
                "with RoPE only."
            )
        ropes = [self._plan_of(model, name).rope for name in names]
        thetas: dict[str | None, float] = {}
        for name, rope in zip(names, ropes, strict=True):
            if rope is not None and thetas.setdefault(rope.layer_type, rope.rope_theta) != rope.rope_theta:
                raise ValueError(
                    f"{name} has rope_theta {rope.rope_theta}, other targeted layers have "
                    f"{thetas[rope.layer_type]}. Adapt them as two adapters, with `target_modules`."
                )
        if thetas:
            peft_config.resolve_bases(thetas)
        for entry in peft_config.modules_to_save or ():
            for name in names:
                if name.endswith(entry):
                    raise ValueError(
                        f"`modules_to_save` holds {entry!r}, which means the adapted attention module {name!r} too, "
                        "because PEFT takes every module whose name ends so. Write more of the name, or leave the "
                        "attention module out with `exclude_modules`."
                    )

    def _choose_targets(self, peft_config: MoICEConfig, model: nn.Module) -> None:
        """Target every attention module of the decoder that has a rotary embedding, as far as the config lets it."""
        config = copy.copy(peft_config)
        # An attention module that an earlier adapter has wrapped goes by its wrapper's name.
        every = [name.removesuffix(".base_layer") for name in attention_module_names(model)]
        config.target_modules = set(every)
        names = [name for name in every if is_target(config, name)]
        if every and not names:
            fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            given = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
            raise ValueError(
                f"The config leaves out all of the model's attention modules ({every[0]!r} and so on): {given}. "
                "Indices of layers start at 0; leave out what excludes the modules that you want to adapt."
            )
        plans = {name: self._plan_of(model, name) for name in names}
        names = [name for name in names if plans[name].rope is not None]
        if not names:
            raise ValueError(explain_no_targets(model, {plan.lacks for plan in plans.values()}))
        config.target_modules = {name.rpartition(".")[2] for name in names}
        peft_config.target_modules = config.target_modules if _targeted(config, model) == names else set(names)

    @staticmethod
    def _check_layers_to_transform(peft_config: MoICEConfig, names: list[str]) -> None:
        """Raise if an index matches none of the targeted modules `names` while others do."""
        if not names:
            return  # PEFT raises where nothing matches at all.
        one_layer = copy.copy(peft_config)
        for index in peft_config.layers_to_transform or ():
            one_layer.layers_to_transform = [index]
            if not any(is_target(one_layer, name) for name in names):
                raise ValueError(
                    f"`layers_to_transform` names layer {index}, but no targeted module lies in one of that index. "
                    "Indices start at 0; leave out those that the model does not have, and layers without a rotary "
                    "embedding."
                )

    @staticmethod
    def _check_target_module_exists(peft_config: MoICEConfig, key: str) -> object:
        return is_target(peft_config, key)

    def _plan_of(self, model: nn.Module, name: str) -> LayerPlan:
        if name not in self._plans:
            target = model.get_submodule(name)
            if isinstance(target, MoICELayer):
                target.rope.check_config()
                self._plans[name] = LayerPlan(target.rope, target.num_heads, target.head_dim)
            else:
                self._plans[name] = self._probe.plan(name)
        return self._plans[name]

    def _create_and_replace(
        self,
        peft_config: MoICEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        plan = self._plan_of(self.model, current_key)
        if plan.rope is None:
            return
        if isinstance(target, MoICELayer):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = MoICELayer(target, plan.rope, plan.num_heads, plan.head_dim)
        new_module.set_adapter(self.active_adapters)
        new_module.update_layer(adapter_name, peft_config)
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
        # Beam search repeats every row of the batch in place.
        num_beams = kwargs.get("num_beams") or 1
        rows = [name for name in adapter_names for _ in range(num_beams)]
        hook = partial(_pass_adapter_names, adapter_names=rows)
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

        Raises:
            ValueError: an adapter does not exist.
        """
        self._check_adapters_exist([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
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
        configs = [self.peft_config[name] for name in adapters]
        config = combined_config(adapters, configs, weights, combination_type, density)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in self._layers():
            if adapter_name in layer.moice_router:
                combine_routers(
                    layer, adapters, weights, adapter_name, combination_type, density, majority_sign_method
                )

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
        self._check_no_other_tuner()
        model = self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)
        if isinstance(model, PreTrainedModel) and any(
            isinstance(module, BuiltInRouters) for module in model.modules()
        ):
            make_standalone(model)
            register_hooks(model)
            watch_positions(model)
            watch_first_pass(model)
        return model

    def _unload_and_optionally_merge(
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
        unwatch_first_pass(self.model)
        if merge:
            # No layers of a tuner are left; what else PEFT does is to untie embeddings that have become different.
            return super()._unload_and_optionally_merge(merge=True)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT's version would also switch the layers of other tuners.
        for module in self.model.modules():
            if isinstance(module, (MoICELayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(enabled)

    def _layers(self) -> list[MoICELayer]:
        return [module for module in self.model.modules() if isinstance(module, MoICELayer)]

    def _check_adapters_exist(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There is no adapter {unknown[0]!r}; this model has {sorted(self.peft_config)}.")

    def _check_no_other_tuner(self) -> None:
        others = other_tuner_layers(self.model)
        if others:
            raise ValueError(
                f"The model still holds {len(others)} layers of another tuner ({type(others[0]).__module__}), so it "
                "cannot become a plain transformers model. Unload MoICE with `unload()`, merge the other adapter "
                "first, and then load MoICE again and merge it."
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoICEConfig,
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
        cls, model: nn.Module, config: MoICEConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_stored_routers(model, adapter_name, state_dict)
        except ValueError:
            discard_if_never_loaded(model, adapter_name)
            raise
        config.awaits_weights = False
        return state_dict


def _targeted(config: MoICEConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `config` targets, those inside of wrapped attention modules left out."""
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if name and "base_layer" not in name.split(".") and is_target(config, name)]


def _check_heads_are_here(config: MoICEConfig, model: nn.Module) -> None:
    """Raise a ValueError if the adapter has weights per head, but tensor parallelism has spread the heads."""
    parts = config.members or [{"router_scope": config.router_scope, "identity": config.init_weights == "identity"}]
    if (getattr(model, "tp_size", None) or 1) > 1 and any(
        part["router_scope"] == "head" or part["identity"] for part in parts
    ):
        raise ValueError(
            "The adapter has weights per head (router_scope='head' or init_weights='identity'), but the model was "
            "loaded with tensor parallelism, where every process holds a part of the heads. Load it without "
            "`tp_plan`, or use an adapter with router_scope='layer' and init_weights=True."
        )


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]):
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _check_not_on_disk(model: nn.Module, name: str) -> None:
    """Raise if the weights of the module called `name` are offloaded to disk.

    PEFT looks offloaded weights up under names that hold for adapters of linear layers only, and transformers' loader
    leaves the adapter of a layer that is on disk at its random start.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = any(
        device == "disk" and (not key or f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}."))
        for key, device in device_map.items()
    )
    if on_disk and any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
        raise ValueError(
            f"The weights of {name!r} are offloaded to disk, where an adapter cannot be loaded. Keep the attention "
            "modules in memory with another `device_map`, or merge the adapter on a machine with more memory "
            "(`merge_and_unload().save_pretrained(...)`) and offload the result."
        )
