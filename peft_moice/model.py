"""`MoICEModel`: injects routers into a model's attention modules."""

import logging

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from .config import MoICEConfig
from .layer import MoICELayer, check_implementation
from .probe import LayerPlan, attention_module_names, plan_layer
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
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: MoICEConfig, model_config: dict) -> MoICEConfig:
        check_implementation(peft_config.implementation)
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
                "top_k equals the number of angles (%d), so the balance loss is a constant without gradient.",
                peft_config.num_experts,
            )
        return peft_config

    def _prepare_model(self, peft_config: MoICEConfig, model: nn.Module) -> None:
        """Probe the targeted layers and resolve what the config leaves open, before anything is replaced."""
        self._plans: dict[str, LayerPlan] = {}
        self._ropes: dict = {}
        if peft_config.target_modules is None:
            self._choose_targets(peft_config, model)
        names = [
            name
            for name, _ in model.named_modules()
            if "base_layer" not in name.split(".") and check_target_module_exists(peft_config, name)
        ]
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

    def _choose_targets(self, peft_config: MoICEConfig, model: nn.Module) -> None:
        """Target every attention module of the decoder that has a rotary embedding."""
        names = [name for name in attention_module_names(model) if self._plan_of(model, name).rope is not None]
        if not names:
            raise ValueError(
                f"No attention module of {type(model).__name__} goes through transformers' attention interface and has "
                "a rotary embedding. MoICE works on RoPE models of transformers; if this is one, name its attention "
                "modules with `target_modules`."
            )
        suffixes = {name.rpartition(".")[2] for name in names}
        matched = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes]
        peft_config.target_modules = suffixes if matched == names else set(names)

    def _plan_of(self, model: nn.Module, name: str) -> LayerPlan:
        if name not in self._plans:
            target = model.get_submodule(name)
            if isinstance(target, MoICELayer):
                self._plans[name] = LayerPlan(target.rope, target.num_heads, target.head_dim)
            else:
                self._plans[name] = plan_layer(model, name, self._ropes)
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
        # PEFT's version copies the weight and bias of a linear layer.
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: MoICEConfig, adapter_name: str) -> None:
        register_hooks(model)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model)
        return model
