"""YaRN (Peng et al., ICLR 2024) in place of the model's own rope, as model cards advise for longer texts; not trained.

Options: `factor` (4.0).
"""

from torch import nn

VARIANTS = {"yarn_2": {"factor": 2.0}}


def make(model: nn.Module, options: dict) -> nn.Module:
    config, factor = model.config, options.get("factor", 4.0)
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": config.max_position_embeddings}
    config.rope_parameters = {**config.rope_parameters, **yarn}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)
