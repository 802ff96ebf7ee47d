"""What the package relies upon in PEFT, transformers and PyTorch beyond what these promise.

Each test names one thing, so that after an upgrade the failures say what moved, and the test says what for.
"""

import enum
import inspect
from typing import ClassVar

import peft
import pytest
import torch
import transformers
from families import tiny_model, tokens
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType, merge_utils, save_and_load
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache, Trainer
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.llama import modeling_llama
from versions import needs_adapter_verbs_of_transformers

from peft_moice.rope.positions import caches_among


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# PEFT


def test_peft_type_is_an_enumeration_of_strings_that_can_be_extended():
    """`registration.add_peft_type` adds a member to these."""
    assert issubclass(PeftType, str) and issubclass(PeftType, enum.Enum)
    member = PeftType["MOICE"]
    assert PeftType("MOICE") is member and PeftType.MOICE is member and member in list(PeftType)
    assert isinstance(member, PeftType) and member.value == member.name == "MOICE" == member
    for table in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert PeftType.LORA.name in getattr(PeftType, table) or PeftType.LORA.value in getattr(PeftType, table)


def test_register_peft_method_fills_the_tables_that_peft_reads():
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        assert PeftType["MOICE"] in table and PeftType.LORA in table


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("_check_new_adapter_config", ["self", "config"]),
        ("_prepare_adapter_config", ["self", "peft_config", "model_config"]),
        ("_prepare_model", ["self", "peft_config", "model"]),
        (
            "_create_and_replace",
            ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key"],
        ),
        ("_replace_module", ["self", "parent", "child_name", "new_module", "child"]),
        ("_post_injection_hook", ["self", "model", "config", "adapter_name"]),
        ("_enable_adapter_layers", ["self", "enabled"]),
        ("_unload_and_optionally_merge", ["self", "merge", "progressbar", "safe_merge", "adapter_names"]),
        ("_get_adapter_state_dict", ["model", "config", "adapter_name", "state_dict"]),
        ("_remove_adapter_name_from_key", ["key", "adapter_name"]),
        ("_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
    ],
)
def test_methods_of_the_tuner_that_are_overridden(name, parameters):
    """PEFT's own code calls them by these names; an override under a name that it dropped would be dead."""
    assert parameters_of(getattr(BaseTuner, name))[: len(parameters)] == parameters


@pytest.mark.parametrize(
    "name, caller",
    [
        ("_post_injection_hook", BaseTuner.__init__),
        ("_prepare_model", BaseTuner.inject_adapter),
        ("_create_and_replace", BaseTuner.inject_adapter),
        ("_enable_peft_forward_hooks", PeftModel._enable_peft_forward_hooks),
        ("_get_adapter_state_dict", save_and_load.get_peft_model_state_dict),
        ("_remove_adapter_name_from_key", save_and_load.get_peft_model_state_dict),
        ("_remap_adapter_state_dict_for_load", save_and_load.set_peft_model_state_dict),
    ],
)
def test_peft_calls_the_methods_that_are_overridden(name, caller):
    assert name in inspect.getsource(caller)


def test_peft_finds_a_layers_device_through_a_method_that_is_overridden():
    """`MoICELayer`'s version knows that attention modules have no weight of their own."""
    assert parameters_of(BaseTunerLayer._get_base_layer_device_and_dtype) == ["self", "base_layer"]
    source = inspect.getsource(BaseTunerLayer._move_adapter_to_device_of_base_layer)
    assert "_get_base_layer_device_and_dtype" in source


@pytest.mark.parametrize("name", ["check_adapters_to_merge", "check_target_module_exists", "onload_layer"])
def test_helpers_of_peft_tuners(name):
    assert callable(getattr(tuners_utils, name))


@pytest.mark.parametrize(
    "name, num_parameters",
    [("task_arithmetic", 2), ("ties", 4), ("dare_ties", 4), ("dare_linear", 3), ("magnitude_prune", 3)],
)
def test_helpers_that_combine_adapters(name, num_parameters):
    assert len(parameters_of(getattr(merge_utils, name))) == num_parameters


def test_peft_marks_modules_to_save_by_a_wrapper():
    assert issubclass(AuxiliaryTrainingWrapper, nn.Module)


@needs_adapter_verbs_of_transformers
def test_transformers_marks_models_that_it_added_adapters_to():
    """The tuner tells transformers' `add_adapter` from a model that another `PeftModel` wraps."""
    assert PreTrainedModel._hf_peft_config_loaded is False
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert model._hf_peft_config_loaded is True


# Transformers: the attention interface


def test_attention_looks_its_function_up_by_the_name_in_its_config():
    """`interface.intercept` writes our name there without touching the other configs."""
    config = tiny_model("llama").config
    config._attn_implementation_internal = "eager"
    assert config._attn_implementation == "eager"


def test_modeling_files_hold_the_interface_and_their_own_eager_attention():
    """The model's own function is found in the globals of its forward."""
    names = inspect.unwrap(modeling_llama.LlamaAttention.forward).__globals__
    assert isinstance(names["ALL_ATTENTION_FUNCTIONS"], AttentionInterface)
    assert callable(names["eager_attention_forward"])
    assert "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(modeling_llama.LlamaAttention.forward).__code__.co_names
    interface = names["ALL_ATTENTION_FUNCTIONS"]
    assert interface.get_interface("eager", len) is len and "moice" in interface


@torch.no_grad()
def test_attention_hands_unknown_keywords_on_to_its_function():
    """The mixture of a pass travels this way."""
    seen = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs, shapes=(query.shape, key.shape), module=module)
        return query.transpose(1, 2), None

    model = tiny_model("llama")
    AttentionInterface.register("recorded", record)
    try:
        attention = model.model.layers[0].self_attn
        attention.config._attn_implementation_internal = "recorded"
        hidden = torch.zeros(2, 5, model.config.hidden_size)
        attention(hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(5)[None]), keyword="value")
    finally:
        del AttentionInterface._global_mapping["recorded"]
    assert seen["keyword"] == "value" and seen["module"] is attention and "scaling" in seen
    assert seen["shapes"][0] == (2, model.config.num_attention_heads, 5, attention.head_dim)


def test_functions_may_be_wrapped_only_in_ways_that_unwrap():
    """`inspect.unwrap` has to reach the modeling file's own forward below decorators such as `deprecate_kwarg`."""
    forward = inspect.unwrap(modeling_llama.LlamaAttention.forward)
    assert forward.__code__.co_filename == modeling_llama.__file__


# Transformers: caches


@torch.no_grad()
def test_a_cache_reaches_attention_as_a_keyword_that_holds_one():
    """Under whatever name: `past_key_values` up to transformers 5.23, `cache` from 5.24."""
    model, seen = tiny_model("llama"), []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(caches_among(args, kwargs)[0]), with_kwargs=True
    )
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(caches_among(args, kwargs)[0]), with_kwargs=True
    )
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache, use_cache=True)
    assert seen == [cache, cache]
    forward = inspect.signature(inspect.unwrap(modeling_llama.LlamaAttention.forward))
    assert [name for name, p in forward.parameters.items() if "Cache" in str(p.annotation)] in (
        ["past_key_values"],
        ["cache"],
    )


def test_the_inner_cache_of_encoder_decoder_models():
    own = DynamicCache()
    assert isinstance(EncoderDecoderCache(own, DynamicCache()), Cache)
    assert caches_among((), {"anything": EncoderDecoderCache(own, DynamicCache())})[0] is own


def test_static_caches_say_where_their_keys_begin():
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(tokens(length=5), past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, StaticLayer) and layer.max_cache_len == 8 for layer in cache.layers)
    assert cache.get_mask_sizes(1, 0) == (8, 0)
    assert int(cache.get_query_offset(0)) == int(cache.get_seq_length(0)) == 5


def test_the_cache_of_continuous_batching_is_no_other_cache():
    """They are told apart by type. From 5.19 on it takes the pass's keywords, and only then can be written by us."""
    from transformers.generation.continuous_batching import PagedAttentionCache

    assert not issubclass(PagedAttentionCache, Cache)
    parameters = parameters_of(PagedAttentionCache.update)
    assert parameters[:4] == ["self", "key_states", "value_states", "layer_idx"]
    assert parameters[4:] in (["kwargs"], ["read_index", "write_index"])


def test_continuous_batching_alone_says_where_to_write():
    """`interface` knows its passes by that keyword, and their sequences by the others."""
    from transformers.generation.continuous_batching import input_outputs

    names = input_outputs.PagedAttentionArgs.__annotations__
    assert {"write_index", "read_index", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "block_table"} <= set(names)


# Transformers: models and files


def test_auto_classes_and_their_mappings():
    """Merged models are registered with every auto class that knows their base."""
    assert issubclass(modeling_auto.AutoModelForCausalLM, _BaseAutoModelClass)
    mapping = modeling_auto.AutoModelForCausalLM._model_mapping
    assert mapping[transformers.LlamaConfig] is transformers.LlamaForCausalLM
    assert parameters_of(modeling_auto.AutoModelForCausalLM.register) == ["config_class", "model_class", "exist_ok"]


def test_modules_that_stay_in_float32():
    """Built-in routers do."""

    class Strict(transformers.LlamaForCausalLM):
        _keep_in_fp32_modules_strict: ClassVar = {"norm"}

    config = tiny_model("llama").config
    model = Strict._from_config(config, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert "norm" in model._keep_in_fp32_modules_strict


def test_transformers_initializes_its_own_models_more_fully():
    assert transformers.LlamaForCausalLM.is_custom_code() is False


def test_conversion_mappings_go_by_class_name_or_model_type():
    from transformers import conversion_mapping

    assert parameters_of(conversion_mapping.get_checkpoint_conversion_mapping)[:1]
    assert {"mapping", "overwrite"} <= set(parameters_of(conversion_mapping.register_checkpoint_conversion_mapping))
    assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral")


def test_integrations_that_the_callback_reports_to():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert all(issubclass(value, transformers.TrainerCallback) for value in INTEGRATION_TO_CALLBACK.values())
    assert parameters_of(Trainer.log)[:2] == ["self", "logs"]


def test_angles_of_dynamic_rope_that_have_grown_are_noted_as_a_tensor():
    """`position_checks` refuses them by that."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    rotary = model.model.rotary_emb
    assert rotary.original_max_seq_len == 16 and not isinstance(rotary.max_seq_len_cached, torch.Tensor)
    model(tokens(length=20))
    assert isinstance(rotary.max_seq_len_cached, torch.Tensor)


# Accelerate


def test_accelerate_hangs_a_hook_on_modules_that_it_dispatches():
    """The probe and the layers ask it for the device."""
    accelerate = pytest.importorskip("accelerate")
    module = nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert module._hf_hook.execution_device == "cpu"
    assert callable(module._hf_hook.pre_forward) and callable(module._hf_hook.post_forward)


# PyTorch


def test_hooks_are_kept_in_tables_by_module():
    """Hooks are found there by their function, because handles do not survive copies."""

    def hook(module, *args):
        return None

    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_forward_hook(hook, with_kwargs=True)
    assert list(module._forward_pre_hooks.values()) == list(module._forward_hooks.values()) == [hook]
    assert list(module._forward_pre_hooks_with_kwargs) == list(module._forward_pre_hooks)
    assert list(module._forward_hooks_with_kwargs) == list(module._forward_hooks)
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    module(torch.zeros(2))
