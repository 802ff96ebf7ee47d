"""Models with routers built in, as merging leaves them and as they come back from disk."""

import copy
import json
import pickle

import pytest
import torch
from families import tiny_model
from peft import AutoPeftModel, LoraConfig, get_peft_model
from representatives import slow_but
from tiny_models import (
    FAMILIES,
    SHAPE,
    WIDE,
    adapted_model,
    assert_logits,
    decide,
    load,
    logits_of,
    save_tiny_model,
    token_ids,
    wide_config,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    SiglipVisionConfig,
)

from peft_moice import MoICEConfig
from peft_moice.standalone import models
from peft_moice.standalone.installing import install_described
from peft_moice.standalone.models import standalone_config_class
from peft_moice.tuner.pretraining import add_routers


def merged(folder: str, **overrides) -> tuple[PreTrainedModel, torch.Tensor]:
    """A standalone model, and the logits of the adapted model that it was made from."""
    model = adapted_model(folder, **overrides)
    expected = logits_of(model)
    return model.merge_and_unload(), expected


OPTIONS = {"qwen2": {"router_scope": "head"}, "gemma3": {"init_weights": "identity"}}


@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], [*FAMILIES, "gemma2", "gemma3", "phi3", "mixtral"]))
def test_round_trip(family, tmp_path):
    folder = save_tiny_model(tmp_path / "base", family)
    model, expected = merged(folder, **OPTIONS.get(family, {}))
    assert_logits(model, expected)
    assert not hasattr(model, "peft_config")
    assert not any("peft." in type(module).__module__ for module in model.modules())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "moice" in name)
    losses = [m(input_ids=token_ids(), labels=token_ids()).loss for m in (model.train(), model.eval())]
    assert torch.equal(*losses), "a balance loss of frozen routers"
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(again) is type(model)
    assert type(again).__name__ == f"MoICE{type(load(folder)).__name__}"
    assert (again.config.model_type, again.config.base_model_type) == ("moice", load(folder).config.model_type)
    assert {**again.config.to_dict(), "_name_or_path": None} == {**model.config.to_dict(), "_name_or_path": None}
    assert torch.equal(logits_of(again), logits_of(model))
    generated = model.generate(token_ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(token_ids(), max_new_tokens=8, do_sample=False), generated)


@pytest.mark.parametrize(
    ("read", "options"),
    [
        (LlamaForCausalLM, {}),
        (LlamaForSequenceClassification, {"num_labels": 3}),
        (LlamaModel, {"dtype": torch.bfloat16}),
        (LlamaConfig, {"id2label": {0: "a"}}),
    ],
)
def test_a_class_without_routers_refuses_the_folder(llama, tmp_path, read, options):
    merged(llama)[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this model has MoICE routers.*auto class, such as AutoModelForCausalLM"):
        read.from_pretrained(tmp_path, **options)


def test_a_config_within_a_config_is_refused_and_read_back_whole(tmp_path):
    config = standalone_config_class(Gemma3Config)(
        base_model_type="gemma3", moice={"routers": [], "layers": {}}, text_config={"id2label": {0: "a", 1: "b"}}
    )
    config.to_json_file(tmp_path / "config.json")
    for plain in (Gemma3Config, Gemma3TextConfig, SiglipVisionConfig):
        with pytest.raises(ValueError, match="this model has MoICE routers"):
            plain.from_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert again.text_config.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_rope_theta_is_refused(family, tmp_path):
    """As by an adapter: the base angles are multiples of the one that they were made for."""
    merged(save_tiny_model(tmp_path / "base", family))[0].save_pretrained(tmp_path / "merged")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    if family == "gemma3":
        rope = {"sliding_attention": rope, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match=r"made for the rope_theta 10+, and the model now has 500000"):
        load(tmp_path / "merged", rope_parameters=rope)


def test_a_config_without_routers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moice", "base_model_type": "llama"}))
    with pytest.raises(ValueError, match=r"'moice' is missing.*merge_and_unload"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(llama, duplicate):
    model, expected = merged(llama)
    twin = duplicate(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    assert type(twin) is type(model)
    twin.model.layers[0].self_attn.moice_routers[0].down_proj.data.zero_()
    assert_logits(model, expected)


def test_tied_weights(tmp_path):
    folder = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    model, _ = merged(folder)
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_embeddings_that_training_has_untied(tmp_path, module):
    folder = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    model = adapted_model(folder, modules_to_save=[module])
    for name, parameter in model.named_parameters():
        if f"{module}.modules_to_save.default" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    expected = logits_of(model)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged_model = model.merge_and_unload()
    assert_logits(merged_model, expected)
    merged_model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(merged_model))


@pytest.mark.parametrize(
    ("auto_class", "output"),
    [
        (AutoModel, "last_hidden_state"),
        (AutoModelForQuestionAnswering, "start_logits"),
        (AutoModelForSequenceClassification, "logits"),
        (AutoModelForTokenClassification, "logits"),
    ],
)
@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "qwen3"]))
def test_every_auto_class(family, auto_class, output, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE)
    model = get_peft_model(auto_class.from_config(config).eval(), MoICEConfig(base_multipliers=WIDE, top_k=2))
    decide(model)
    with torch.no_grad():
        expected = model(token_ids())[output]
        merged_model = model.merge_and_unload()
        torch.testing.assert_close(merged_model(token_ids())[output], expected, rtol=0, atol=1e-6)
        merged_model.save_pretrained(tmp_path)
        again = auto_class.from_pretrained(tmp_path).eval()
        assert torch.equal(again(token_ids())[output], merged_model(token_ids())[output])
    assert type(again) is type(merged_model)
    # The config that the base model was made from still makes such models.
    assert type(again).__name__ == f"MoICE{type(auto_class.from_config(config)).__name__}"


def test_the_balance_loss_of_a_model_within_a_model(tmp_path):
    """Reloading builds the decoder of a classifier by an auto class, as a model with routers of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, num_labels=3)
    routed = MoICEConfig(base_multipliers=WIDE, top_k=2, router_aux_loss_coef=0.5)
    model = add_routers(AutoModelForSequenceClassification.from_config(config), routed)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    outputs = [m.train()(token_ids(), labels=torch.tensor([0, 2])) for m in (model, again)]
    assert outputs[0].loss - model.eval()(token_ids(), labels=torch.tensor([0, 2])).loss > 0.1
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_merging_twice_is_merging_once(llama):
    model = adapted_model(llama)
    once = model.merge_and_unload()
    expected = logits_of(once)
    twice = model.merge_and_unload()
    assert twice is once
    assert (type(twice).__name__, type(twice.config).__name__) == ("MoICELlamaForCausalLM", "MoICELlamaConfig")
    assert twice.config.base_model_type == "llama"
    assert torch.equal(logits_of(twice), expected)
    with pytest.raises(ValueError, match="has routers built in already"):
        model.add_adapter("second", wide_config())
    assert torch.equal(logits_of(twice), expected)


@pytest.mark.slow
def test_compiled(llama):
    model, expected = merged(llama)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_logits(compiled, expected, atol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    assert_logits(model, expected, atol=1e-5)


@pytest.mark.parametrize("autocast, dtype", [(True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)])
def test_half_precision_keeps_routers_in_float32(llama, tmp_path, autocast, dtype):
    """Without PEFT's `autocast_adapter_dtype`, routers of half precision are built in in float32."""
    model = get_peft_model(load(llama, dtype=dtype), wide_config(), autocast_adapter_dtype=autocast).eval()
    decide(model)
    expected = logits_of(model)
    standalone = model.merge_and_unload()
    difference = (logits_of(standalone) - expected).abs()
    assert (difference.max() == 0) if autocast else (difference.median() < 0.02 * expected.abs().max())
    standalone.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {p.dtype for name, p in again.named_parameters() if "moice" in name} == {torch.float32}
    assert {p.dtype for name, p in again.named_parameters() if "moice" not in name} == {dtype}
    assert torch.equal(logits_of(again), logits_of(standalone))


def test_several_adapters_with_other_layers(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(layers_to_transform=[0, 1]), adapter_name="a")
    model.add_adapter("b", wide_config(base_multipliers=[1.0, 3.0], top_k=1, layers_to_transform=[1]))
    decide(model, "a")
    decide(model, "b", seed=1)
    model.base_model.set_adapter(["a", "b"])
    expected = logits_of(model.eval())
    standalone = model.merge_and_unload()
    standalone.save_pretrained(tmp_path)
    assert_logits(load(tmp_path), expected)


def test_without_and_with_another_head(llama, tmp_path):
    model, _ = merged(llama)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = decoder(token_ids()).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits_of(model))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert torch.equal(classifier.model(token_ids()).last_hidden_state, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["peft_moice.standalone", "peft_moice.standalone.models"])
def test_an_adapter_of_another_kind_names_the_class_of_its_base(llama, tmp_path, library):
    """Without a task type PEFT imports the class by its name."""
    model, _ = merged(llama)
    model.save_pretrained(tmp_path / "merged")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lora = get_peft_model(load(tmp_path / "merged"), config).eval()
    lora.save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields["auto_mapping"]["base_model_class"] == "MoICELlamaForCausalLM"
    file.write_text(json.dumps({**fields, "auto_mapping": {**fields["auto_mapping"], "parent_library": library}}))
    again = AutoPeftModel.from_pretrained(tmp_path / "lora", import_allowlist=[library]).eval()
    assert_logits(again, logits_of(lora))


def test_classes_by_their_names():
    assert models.MoICELlamaForCausalLM is models.standalone_model_class(LlamaForCausalLM)
    assert pickle.loads(pickle.dumps(models.MoICELlamaConfig)) is models.standalone_config_class(LlamaConfig)
    for name in ("MoICENobodysForCausalLM", "MoICEAutoTokenizer", "LlamaForCausalLM"):
        with pytest.raises(AttributeError, match=f"standalone.models' has no attribute '{name}'"):
            getattr(models, name)


def test_buffers_that_are_not_saved_come_back(tmp_path):
    """Falcon-H1 computes `mup_vector` anew when it is loaded, which transformers leaves out for models not its own."""
    model = tiny_model("falcon_h1", ssm_multipliers=[0.5, 2.0, 3.0, 0.25, 4.0])
    expected = {name: buffer for name, buffer in model.named_buffers() if name.endswith("mup_vector")}
    assert expected and all(buffer.unique().numel() > 2 for buffer in expected.values())
    merged_model = get_peft_model(model, wide_config()).merge_and_unload()
    merged_model.save_pretrained(tmp_path)
    for _ in range(3):  # memory that is not written may hold the right numbers by chance
        buffers = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
        for name, buffer in expected.items():
            assert torch.equal(buffers[name], buffer)


def test_routers_of_a_mean_keep_their_own_coefficients_of_the_balance_loss(llama):
    """With adapters of different coefficients, the config of their mean has none to share among the routers."""
    model = get_peft_model(load(llama), wide_config(router_aux_loss_coef=0.1), adapter_name="a")
    model.add_adapter("b", wide_config(router_aux_loss_coef=0.2))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    config = model.peft_config["mean"]
    assert config.router_aux_loss_coef is None
    built = add_routers(load(llama), config)
    assert [router["router_aux_loss_coef"] for router in built.config.moice["routers"]] == [0.1, 0.2]


def test_a_description_that_meets_a_model_without_rotary_embedding(llama):
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32))
    described = merged(llama)[0].config.moice
    described["layers"] = {"transformer.h.0.attn": described["layers"]["model.layers.0.self_attn"]}
    with pytest.raises(ValueError, match=r"'transformer.h.0.attn', but that of GPT2LMHeadModel has no rotary embed"):
        install_described(model, described)
