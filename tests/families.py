"""Tiny random models of any decoder family of transformers, built from the family's own default config."""

import copy
import dataclasses

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB_SIZE = 128

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "rotary_dim": 8,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "zero_expert_num": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "depth": 2,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "projector_hidden_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small values for fields that a family's config has."""


def mrope(*sections: int) -> dict:
    """Rope parameters that share the pairs of coordinates out among time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}}


VISION_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "model_args": {"embed_dim": 64},
}
"""In place of vision towers that need another package."""

FAMILY_SIZES = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "chameleon_vqgan": {"base_channels": 32, "embed_dim": 32, "latent_channels": 32, "num_embeddings": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": mrope(2, 3, 3),
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2},
    "deepseek_ocr2_sam_vision_model": {"global_attn_indexes": [1], "image_size": 64, "window_size": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "moe_k": 2, **mrope(3, 3, 2)},
    "fast_vlm": {"vision_config": VISION_TOWER},
    "perception_lm": {"vision_config": VISION_TOWER},
    "janus_vqgan": {"base_channels": 32, "projection_dim": 64, "image_token_embed_dim": 64, "num_embeddings": 16},
    "glm4v_moe_text": mrope(1, 1, 2),
    "glm4v_text": mrope(2, 3, 3),
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "glm_ocr_text": mrope(2, 3, 3),
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope"},
    "hunyuan_vl_text": mrope(2, 2, 2, 2),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [1, 1]},
    "paddleocr_vl_text": mrope(2, 3, 3),
    "qwen2_5_omni_text": mrope(2, 3, 3),
    "qwen2_5_vl_text": mrope(2, 3, 3),
    "qwen2_vl_text": mrope(2, 3, 3),
    "qwen2_vl_vision": {"embed_dim": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "xlm": {"emb_dim": 64},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides."""

WHY_NOT = {
    "diffusion_gemma": "it fills a random canvas, so its logits differ from call to call",
    "gemma3n": "its vision tower needs timm; its text tower is `gemma3n_text`",
    "gemma4_assistant": "it drafts for another model, on whose keys it attends",
    "gemma4_unified_assistant": "it drafts for another model, on whose keys it attends",
    "idefics": "it needs images",
    "inkling_mm_model": "it needs scipy; its text tower is `inkling_text`",
    "pi0": "it needs the state of a robot",
    "pp_formulanet": "PEFT asks it for input embeddings, which it does not have; its decoder is mBART's",
}
"""Families that are not tried, and the reason."""

LARGEST_MODEL = 20_000_000
"""Number of parameters above which a model is not filled with weights."""


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM, or else AutoModelForImageTextToText, takes for `model_type`."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return getattr(transformers, names[model_type])


def tiny_config(config_class: type[PreTrainedConfig], **overrides) -> PreTrainedConfig:
    """The family's default config with few layers and small sizes.

    Every type of layer that the default config has occurs once.
    """
    own = copy.deepcopy(FAMILY_SIZES.get(config_class.model_type, {}))
    default = config_class(**{name: own[name] for name in config_class.sub_configs if name in own})
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    if "qk_rope_head_dim" in fields:  # latent attention: every query head has its own key
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in fields:
        values["layer_types"] = kinds
        values["num_hidden_layers"] = len(kinds)
    values.update(own)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in values and name not in overrides:
            values[name] = tiny_config(type(part))
    return config_class(**{**values, **overrides})


def tiny_model(model_type: str | type[PreTrainedModel], theta_factor: float = 1.0, **overrides) -> PreTrainedModel:
    """A model of the family in evaluation mode, with random weights that are the same at every call.

    Weights are wide enough for attention to depend on positions, and norms are not the identity.

    Args:
        model_type: a key of AutoModelForCausalLM or AutoModelForImageTextToText, or a class of models.
        theta_factor: what every `rope_theta` of the default config is multiplied with.
        overrides: further fields of the config.
    """
    cls = model_class(model_type) if isinstance(model_type, str) else model_type
    config = tiny_config(cls.config_class, **overrides)
    scale_rope_theta(config, theta_factor)
    torch.manual_seed(0)
    model = cls(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()


def model_without_weights(model_type: str) -> PreTrainedModel:
    """The model on the meta device, which takes no memory."""
    cls = model_class(model_type)
    with torch.device("meta"):
        return cls(tiny_config(cls.config_class))


def scale_rope_theta(config: PreTrainedConfig, factor: float) -> None:
    """Multiply every base angle in the config and its parts by `factor`."""

    def scale(parameters: dict) -> None:
        for name, value in parameters.items():
            if isinstance(value, dict):
                scale(value)
            elif name == "rope_theta":
                parameters[name] = value * factor

    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if getattr(part, "rope_parameters", None):
            scale(part.rope_parameters)
        if getattr(part, "layer_rope_theta", None):
            part.layer_rope_theta = [theta * factor for theta in part.layer_rope_theta]


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`, none of them special."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
