"""MoICE routers (Lin et al., arXiv 2406.19598), the method of this package.

Options: `experts`, a key of `EXPERTS` ("angles"), or in its place `multipliers` of the model's own base; `top_k`,
`scope`, `router_dim` and `layers`: those of `MoICEConfig`; `balance`, the coefficient of the balance loss (0.0);
`from_equal`, whether the routers start at the equal mixture and not as the base model (False).
"""

import torch
from peft import get_peft_model
from torch import nn

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.rope import RotationTable
from peft_moice.tuner.config import RELEASED_MULTIPLIERS

ANGLES = [(1.0, 1.0), (0.25, 1.0), (0.5, 1.0), (2.0, 1.0), (4.0, 1.0)]
"""Experts of the demo: base angles as multiples of the model's own, each with temperature 1."""

EXPERTS = {
    "angles": ANGLES,
    "released": [(multiplier, 1.0) for multiplier in RELEASED_MULTIPLIERS],
    "greater": [(1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0)],
    "temperatures": [(1.0, 1.0), (1.0, 0.75), (1.0, 1.25), (1.0, 1.5), (1.0, 2.0)],
    "both": [(1.0, 1.0), (1.0, 1.25), (1.0, 1.6), (0.25, 1.0), (0.25, 1.4), (4.0, 1.0)],
}

VARIANTS = {
    "routers_greater": {"experts": "greater"},
    "routers_released": {"experts": "released", "top_k": 4, "from_equal": True, "balance": 0.3},
    "routers_k1": {"top_k": 1},
    "routers_k2": {"top_k": 2},
    "routers_temperatures": {"experts": "temperatures"},
    "routers_both": {"experts": "both"},
    "routers_both_heads": {"experts": "both", "scope": "head", "router_dim": 16},
    "routers_heads": {"scope": "head", "router_dim": 16},
}


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


def make(model: nn.Module, options: dict) -> nn.Module:
    experts = EXPERTS[options.get("experts", "angles")]
    if "multipliers" in options:
        experts = [(multiplier, 1.0) for multiplier in options["multipliers"]]
    temperatures = [temperature for _, temperature in experts]
    twins = len({angle for angle, _ in experts}) < len(experts)
    # Equal angles are told apart by a millionth: the config takes an angle once, and the table is ours anyway.
    config = MoICEConfig(
        base_multipliers=[angle * (1 + 1e-6 * i * twins) for i, (angle, _) in enumerate(experts)],
        init_weights=True if options.get("from_equal") else "identity",
        router_aux_loss_coef=options.get("balance", 0.0),
        router_scope=options.get("scope", "layer"),
        router_dim=options.get("router_dim"),
        top_k=options.get("top_k"),
        layers_to_transform=options.get("layers"),
    )
    adapted = get_peft_model(model, config)
    if any(temperature != 1.0 for temperature in temperatures):
        for layer in adapted.modules():
            if isinstance(layer, MoICELayer):
                bases = tuple(adapted.peft_config["default"].rope_bases)
                plain = layer.rope.table(bases)
                table = TemperedTable(plain.deltas, plain.layout, temperatures)
                layer.rope.table = lambda rope_bases, table=table: table
                layer.rope._tables[bases, False] = table
    return adapted
