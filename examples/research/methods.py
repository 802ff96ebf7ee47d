"""What is compared: routers, their static controls, other mixtures, query scales, LoRA, and rivals without training.

`make, options = METHODS[name]`, and `make(model, options)` returns the model to train. What has something to train
starts as the base model.
"""

from collections.abc import Callable

import torch
from buckets import buckets
from controls import mix_scores
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from per_head import HeadGeometry, ms_poe, per_head, single_base
from torch import nn

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.rope import RotationTable
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

ANGLES = [(1.0, 1.0), (0.25, 1.0), (0.5, 1.0), (2.0, 1.0), (4.0, 1.0)]
"""Experts of today's demo: base angles as multiples of the model's own, each with temperature 1."""

EXPERTS = {
    "angles": ANGLES,
    "released": [(multiplier, 1.0) for multiplier in RELEASED_MULTIPLIERS],
    "greater": [(1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0)],
    "temperatures": [(1.0, 1.0), (1.0, 0.75), (1.0, 1.25), (1.0, 1.5), (1.0, 2.0)],
    "both": [(1.0, 1.0), (1.0, 1.25), (1.0, 1.6), (0.25, 1.0), (0.25, 1.4), (4.0, 1.0)],
}


class HalfLinear(nn.Linear):
    """A frozen linear layer that multiplies in bfloat16: four times as fast on the processor used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(x.bfloat16(), self.weight).float()
        return product if self.bias is None else product + self.bias


def halve(model: nn.Module) -> None:
    """Exchange the frozen linear layers of a model that has its adapter already."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = HalfLinear
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


class TemperedTable(RotationTable):
    """Rotations whose cosines and sines carry the square root of a temperature, for queries and for keys.

    Every coordinate of the model is rotated, so scores under expert j come out multiplied by its temperature. Holds
    for implementations that rotate both sides by the table, not for decoding by differences.
    """

    def __init__(self, deltas: torch.Tensor, layout, temperatures: list[float]):
        super().__init__(deltas, layout)
        self.roots = torch.tensor(temperatures, dtype=torch.float32).sqrt()[:, None, None]
        self.is_identity = [same and t == 1.0 for same, t in zip(self.is_identity, temperatures, strict=True)]

    def at_least(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        tables = super().at_least(length, device)
        key = (tables[0].shape[1], device)
        if key not in self._tables:
            self._tables[key] = tuple((table * self.roots).contiguous() for table in tables)
        return self._tables[key]


class StaticRouter(nn.Module):
    """Stands in for a router: logits per head that no token changes."""

    def __init__(self, heads: int, experts: int):
        super().__init__()
        self.head_logits = nn.Parameter(torch.zeros(heads, experts))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        return self.head_logits[None, :, None].expand(batch, heads, length, -1)


def mixture(model: nn.Module, options: dict) -> nn.Module:
    """Routers (or static gates) over experts that are an angle and a temperature."""
    experts = EXPERTS[options["experts"]]
    # Equal angles are told apart by a millionth: the config takes an angle once, and the table is ours anyway.
    config = MoICEConfig(
        base_multipliers=[angle * (1 + 1e-6 * i) if i else 1.0 for i, (angle, _) in enumerate(experts)],
        init_weights=True if options.get("equal") or options.get("from_equal") else "identity",
        router_aux_loss_coef=options.get("balance", 0.0),
        router_scope=options.get("scope", "layer"),
        router_dim=options.get("router_dim"),
        top_k=options.get("top_k"),
        layers_to_transform=options.get("layers"),
    )
    adapted = get_peft_model(model, config)
    for layer in adapted.modules():
        if not isinstance(layer, MoICELayer):
            continue
        if any(t != 1.0 for _, t in experts):
            plain = layer.rope.table(tuple(adapted.peft_config["default"].rope_bases))
            table = TemperedTable(plain.deltas, plain.layout, [t for _, t in experts])
            layer.rope.table = lambda rope_bases, table=table: table
            layer.rope._tables[tuple(adapted.peft_config["default"].rope_bases), False] = table
        if options.get("static"):
            router = layer.moice_router["default"]
            static = StaticRouter(layer.num_heads, len(experts))
            router.forward = static.forward
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(router, name).requires_grad_(False)
            static.requires_grad_(not options.get("equal"))
            router.static = static
    if "scores" in options:
        mix_scores(adapted, options["scores"])
    return adapted


def freeze_to_best(model: nn.Module) -> None:
    """Give every head of static gates the one expert whose gate is greatest: no mixture is left."""
    for layer in model.modules():
        if isinstance(layer, MoICELayer):
            router = layer.moice_router["default"]
            logits = router.static.head_logits[None, :, None].detach()
            best = router.gates(logits, router.num_experts)[0, :, 0].argmax(-1)
            gates = nn.functional.one_hot(best, router.num_experts).float()
            router.gates = lambda logits, top_k, gates=gates: gates[None, :, None].expand(logits.shape).contiguous()


class QueryScale(nn.Module):
    """exp(scale) of each head's query before rotation: one number per head, or one per head and token."""

    def __init__(self, heads: int, head_dim: int, by_token: bool, hidden: int = 5):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.by_token = by_token
        if by_token:
            self.gate_proj = nn.Parameter(torch.randn(hidden, head_dim) * 0.02)
            self.up_proj = nn.Parameter(torch.randn(hidden, head_dim) * 0.02)
            self.down_proj = nn.Parameter(torch.zeros(heads, hidden))

    def forward(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        query = output.unflatten(-1, (self.heads, self.head_dim))
        log_scale = self.log_scale
        if self.by_token:
            hidden = nn.functional.silu(query @ self.gate_proj.mT) * (query @ self.up_proj.mT)
            log_scale = log_scale + (hidden * self.down_proj).sum(-1).clamp(-1.5, 1.5)
        return (query * log_scale.exp()[..., None]).flatten(-2)


def query_scales(model: nn.Module, options: dict) -> nn.Module:
    """No mixture: the model's own angle and a learned temperature."""
    if not hasattr(model, "peft_config"):
        model.requires_grad_(False)
    heads, head_dim = model.config.num_attention_heads, head_dim_of(model)
    for module in list(model.modules()):
        projection = module._modules.get("q_proj")
        if projection is not None:
            module.query_scale = QueryScale(heads, head_dim, options.get("by_token", False))
            projection.register_forward_hook(module.query_scale)
    return model


def lora(model: nn.Module, options: dict) -> nn.Module:
    layers = None
    if options.get("equal_size"):
        layers = list(range(model.config.num_hidden_layers))[-layers_of_equal_size(model) :]
    config = LoraConfig(
        r=options.get("r", 1),
        lora_alpha=options.get("r", 1),
        target_modules=options.get("targets", ["q_proj"]),
        layers_to_transform=layers,
    )
    return get_peft_model(model, config)


def layers_of_equal_size(model: nn.Module) -> int:
    """In how many layers LoRA of rank 1 on the query projection has as many parameters as five experts' routers."""
    config, experts = model.config, len(ANGLES)
    router = 2 * experts * head_dim_of(model) + experts**2 + config.num_attention_heads
    rank = config.hidden_size + config.num_attention_heads * head_dim_of(model)
    return max(1, round(config.num_hidden_layers * router / rank))


def head_dim_of(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def lora_below_routers(model: nn.Module, options: dict) -> nn.Module:
    """Routers over a model whose query projections have LoRA, trained together."""
    below = lora(model, options)
    adapted = mixture(below.base_model.model, {"experts": options["experts"]})
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return adapted


def mixture_and_scales(model: nn.Module, options: dict) -> nn.Module:
    return query_scales(mixture(model, options), options)


METHODS: dict[str, tuple[Callable[[nn.Module, dict], nn.Module], dict]] = {
    "base": (lambda model, options: model.requires_grad_(False), {}),
    "routers": (mixture, {"experts": "angles"}),
    "routers_greater": (mixture, {"experts": "greater"}),
    "routers_released": (mixture, {"experts": "released", "top_k": 4, "from_equal": True, "balance": 0.3}),
    "routers_k2": (mixture, {"experts": "angles", "top_k": 2}),
    "routers_temperatures": (mixture, {"experts": "temperatures"}),
    "routers_both": (mixture, {"experts": "both"}),
    "routers_both_heads": (mixture, {"experts": "both", "scope": "head", "router_dim": 16}),
    "routers_heads": (mixture, {"experts": "angles", "scope": "head", "router_dim": 16}),
    "static": (mixture, {"experts": "angles", "static": True}),
    "static_temperatures": (mixture, {"experts": "temperatures", "static": True}),
    "static_both": (mixture, {"experts": "both", "static": True}),
    "scales": (query_scales, {}),
    "scales_by_token": (query_scales, {"by_token": True}),
    "routers_and_scales_by_token": (mixture_and_scales, {"experts": "angles", "by_token": True}),
    "lora_q": (lora, {"r": 1}),
    "lora_q_equal": (lora, {"r": 1, "equal_size": True}),
    "lora_r8": (lora, {"r": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "lora_below_routers": (lora_below_routers, {"experts": "angles", "r": 1, "equal_size": True}),
    "routers_k1": (mixture, {"experts": "angles", "top_k": 1}),
    "score_mean": (mixture, {"experts": "angles", "scores": "mean"}),
    "equal": (mixture, {"experts": "angles", "static": True, "equal": True}),
    "equal_score_mean": (mixture, {"experts": "angles", "static": True, "equal": True, "scores": "mean"}),
    "equal_score_greatest": (mixture, {"experts": "angles", "static": True, "equal": True, "scores": "greatest"}),
    "base_per_head": (per_head, {"learned": ("base",)}),
    "base_and_scale_per_head": (per_head, {"learned": ("base", "scale")}),
    "geometry_per_head": (per_head, {"learned": ("base", "positions", "scale")}),
    "single_0.25": (single_base, {"multiplier": 0.25}),
    "single_0.5": (single_base, {"multiplier": 0.5}),
    "single_2": (single_base, {"multiplier": 2.0}),
    "single_4": (single_base, {"multiplier": 4.0}),
    "ms_poe": (ms_poe, {}),
    "buckets": (buckets, {"multipliers": [angle for angle, _ in ANGLES]}),
}
UNTRAINED = (
    "base", "equal", "equal_score_mean", "equal_score_greatest", "single_0.25", "single_0.5", "single_2", "single_4",
    "ms_poe", "buckets",
)  # fmt: skip


def without_adapter(model: nn.Module):
    """A context in which the model is the base model."""
    return _Without(model)


class _Without:
    """Switches off a PEFT adapter, LoRA below it, query scales and geometries of heads."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.scales = [module for module in model.modules() if isinstance(module, QueryScale)]
        self.geometries = [module for module in model.modules() if isinstance(module, HeadGeometry)]
        self.loras = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def __enter__(self):
        self.disabled = self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else None
        if self.disabled is not None:
            self.disabled.__enter__()
        for scale in self.scales:
            scale.forward = lambda module, args, output: output
        self._enable(False)

    def __exit__(self, *error):
        for scale in self.scales:
            del scale.forward
        if self.disabled is not None:
            self.disabled.__exit__(*error)
        self._enable(True)

    def _enable(self, enabled: bool):
        for geometry in self.geometries:
            geometry.enabled = enabled
        for layer in self.loras:
            # Not `enable_adapters`, which would also change what is trained.
            layer._disable_adapters = not enabled


def number_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
