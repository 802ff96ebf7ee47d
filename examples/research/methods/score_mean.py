"""Routers that mix the scores of several bases before one softmax, not probabilities: a control of this project.

Options: those of `routers`, or with `equal` those of `static`; `scores`, "mean" by the gates or "greatest" ("mean").
"""

from types import ModuleType

import torch

from methods import routers, static
from peft_moice import MoICELayer
from peft_moice.attention import operator
from peft_moice.attention.call import AttentionCall
from peft_moice.attention.reference import bias_of
from peft_moice.attention.rotating import rotated_pairs


class ScoreMixture(ModuleType):
    """One softmax over scores that were mixed before: their mean by the gates, or their greatest."""

    def __init__(self, name: str, greatest: bool):
        super().__init__(name)
        self.greatest = greatest

    def why_not(self, call: AttentionCall) -> str | None:
        return call.why_not_plain()

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        groups = call.query.shape[1] // call.key.shape[1]
        mixed = None
        for expert, (query, key) in enumerate(rotated_pairs(call)):
            scores = query @ key.repeat_interleave(groups, dim=1).mT * call.scaling
            if self.greatest:
                # The gates take part as logarithms: an expert that is not wanted is not greatest.
                scores = scores + call.gates[..., expert, None].clamp(min=1e-6).log()
                mixed = scores if mixed is None else torch.maximum(mixed, scores)
            else:
                scores = call.gates[..., expert, None] * scores
                mixed = scores if mixed is None else mixed + scores
        probs = (mixed + bias_of(call)).softmax(-1)
        output = probs @ call.value.repeat_interleave(groups, dim=1)
        return output.transpose(1, 2).contiguous(), None


SCORE_MIXTURES = {"mean": ScoreMixture("score_mean", False), "greatest": ScoreMixture("score_greatest", True)}
VARIANTS = {
    "equal_score_mean": {"equal": True},
    "equal_score_greatest": {"equal": True, "scores": "greatest"},
}


def make(model: torch.nn.Module, options: dict) -> torch.nn.Module:
    adapted = (static if options.get("equal") else routers).make(model, options)
    implementation = SCORE_MIXTURES[options.get("scores", "mean")]
    operator.IMPLEMENTATIONS[implementation.__name__] = implementation
    for layer in adapted.modules():
        if isinstance(layer, MoICELayer):
            for spec in layer.router_specs["default"]:
                spec.implementation = implementation.__name__
    return adapted
