"""Tiny random models on disk, and adapters on them that decide firmly."""

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from peft_moice import MoICEConfig, MoICELayer

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
OTHER_FAMILIES = {
    "phi": (PhiConfig, {}),  # rotates half of a head
    "gemma3": (Gemma3TextConfig, {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 6, "attn_implementation": "eager"}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "gpt2": (GPT2Config, {}),  # no rotary embedding
}
TRAINING = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Arguments of a Trainer that takes a step on the CPU and leaves nothing but its log."""
WIDE = [1.0, 0.25, 0.5, 4.0]
"""Multiples that change the output of a short sequence visibly."""
OTHER = {"base_multipliers": [1.0, 3.0, 0.3], "top_k": 1, "router_scope": "head"}
"""What an adapter of another shape differs in."""


def widen(model: torch.nn.Module) -> None:
    """The usual standard deviation of 0.02 leaves attention nearly uniform, so that angles would hardly matter."""
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def save_tiny_model(folder: Path, family: str = "llama", **overrides) -> str:
    """Write a random model of `family` with a tokenizer to `folder`; returns the folder."""
    config_class, own = {**FAMILIES, **OTHER_FAMILIES}[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **own, **overrides}))
    widen(model)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    _saved[str(folder)] = None
    return str(folder)


def tiny_encoder_decoder(**overrides) -> T5GemmaForConditionalGeneration:
    """A random T5Gemma with two layers on either side; `overrides` are fields of both sides."""
    side = {**SHAPE, "num_hidden_layers": 2, "query_pre_attn_scalar": 16, **overrides}
    sides = {name: T5GemmaModuleConfig(**side) for name in ("encoder", "decoder")}
    torch.manual_seed(0)
    return T5GemmaForConditionalGeneration(T5GemmaConfig(**sides, **SHAPE, dropout_rate=0.0)).eval()


def load(folder: str, **kwargs) -> PreTrainedModel:
    """The model of a folder. Those of [`save_tiny_model`] are read once and copied, in a fifth of the time."""
    if kwargs or str(folder) not in _saved:
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    if _saved[str(folder)] is None:
        _saved[str(folder)] = AutoModelForCausalLM.from_pretrained(folder).eval()
    return copy.deepcopy(_saved[str(folder)])


_saved: dict[str, PreTrainedModel | None] = {}


def wide_config(**overrides) -> MoICEConfig:
    """A config whose adapters change the output of a tiny model."""
    return MoICEConfig(**{"base_multipliers": list(WIDE), "top_k": 2, "task_type": "CAUSAL_LM", **overrides})


def decide(model: torch.nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    """Fill an adapter's routers with weights large enough to prefer some angles clearly."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        if adapter_name in layer.moice_router:
            for parameter in layer.moice_router[adapter_name].parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)


def adapted_model(folder: str, **overrides) -> PeftModel:
    """A tiny model with one adapter that decides firmly."""
    model = get_peft_model(load(folder), wide_config(**overrides)).eval()
    decide(model)
    return model


def two_adapters(folder: str, **second) -> PeftModel:
    """A tiny model with the adapters "one" and "two" (active: "one"), whose routers differ."""
    model = get_peft_model(load(folder), wide_config(), adapter_name="one").eval()
    model.add_adapter("two", wide_config(**second))
    decide(model, "one", seed=1)
    decide(model, "two", seed=2)
    return model


def layers_of(model: torch.nn.Module) -> list[MoICELayer]:
    return [module for module in model.modules() if isinstance(module, MoICELayer)]


def token_ids(batch: int = 2, length: int = 14, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: torch.nn.Module, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(token_ids() if input_ids is None else input_ids).logits


def assert_logits(model: torch.nn.Module, expected: torch.Tensor, atol: float = 1e-6) -> None:
    """The model computes `expected` for the tokens of [`token_ids`]."""
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=atol)


def router_state(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """A copy of an adapter's router weights."""
    marker = f".{adapter_name}."
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "moice_router" in name and marker in name
    }


def logits_with(model: PeftModel, *adapters: str) -> torch.Tensor:
    model.base_model.set_adapter(list(adapters))
    return logits_of(model)


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """One step of gradient descent, which leaves the model in evaluation mode."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
