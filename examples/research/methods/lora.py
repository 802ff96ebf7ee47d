"""LoRA (Hu et al., arXiv 2106.09685), as PEFT has it.

Options: `r`, the rank, also for `lora_alpha` (1); `targets`, names of projections (`["q_proj"]`); `equal_size`, if
only as many of the upper layers have it as give the number of parameters of routers over five angles (False).
"""

from models import head_dim_of
from peft import LoraConfig, get_peft_model
from torch import nn

VARIANTS = {
    "lora_q": {},
    "lora_q_equal": {"equal_size": True},
    "lora_r8": {"r": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def make(model: nn.Module, options: dict) -> nn.Module:
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


def layers_of_equal_size(model: nn.Module, experts: int = 5) -> int:
    """In how many layers LoRA of rank 1 on the query projection has as many parameters as the experts' routers."""
    config, head_dim = model.config, head_dim_of(model)
    router = 2 * experts * head_dim + experts**2 + config.num_attention_heads
    rank = config.hidden_size + config.num_attention_heads * head_dim
    return max(1, round(config.num_hidden_layers * router / rank))
