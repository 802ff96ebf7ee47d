"""Quantized base models: an adapter mixes what the quantized model computes, and leaves its weights alone."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny_models import decide, layers_of, load, logits_of, router_state, save_tiny_model, token_ids, wide_config
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from peft_moice.cli.main import main
from peft_moice.evaluation import Result

pytestmark = pytest.mark.slow


def torchao_int8() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    groups = quantization.PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def torchao_int4_packed() -> TorchAoConfig:
    """With PyTorch's int4 kernel for CPUs, which has no backward pass."""
    prototype = pytest.importorskip("torchao.prototype.quantization.int4", exc_type=ImportError)
    return TorchAoConfig(prototype.PrototypeInt4WeightOnlyConfig(group_size=32))


def bitsandbytes_int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


TRAINABLE = [torchao_int8, torchao_int4, bitsandbytes_int8, bitsandbytes_nf4]
ALL = [*TRAINABLE, torchao_int4_packed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=64)


def load_quantized(folder: str, scheme):
    return load(folder, quantization_config=scheme(), dtype=torch.float32, device_map={"": "cpu"})


def adapted(model: nn.Module, **overrides) -> PeftModel:
    model = get_peft_model(model, wide_config(**overrides)).eval()
    decide(model)
    return model


def router_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.train()
    model(token_ids(), labels=token_ids()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def dequantize(model: nn.Module) -> nn.Module:
    """Put plain linear layers with the same values in place of quantized ones."""
    for holder in list(model.modules()):
        for name, layer in list(holder.named_children()):
            if not isinstance(layer, nn.Linear) or type(layer.weight) is nn.Parameter:
                continue
            if hasattr(layer.weight, "quant_state"):
                weight = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(
                    layer.weight.data, layer.weight.quant_state
                )
            else:
                weight = layer.weight.dequantize()
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data.copy_(weight.reshape(plain.weight.shape))
            setattr(holder, name, plain)
    return model


@pytest.mark.parametrize("scheme", ALL)
def test_the_mixture_equals_the_reference(folder, scheme):
    model = adapted(load_quantized(folder, scheme))
    for parameter in layers_of(model)[0].moice_router.parameters():
        assert parameter.dtype == torch.float32 and parameter.device == torch.device("cpu")
    expected = logits_of(adapted(load_quantized(folder, scheme), implementation="reference"))
    # A scheme that rounds activations to 8 bits may round one of them the other way.
    rounding = 1 / 127 if scheme is bitsandbytes_int8 else 1e-5
    for implementation in ("auto", "delegated"):
        actual = logits_of(adapted(load_quantized(folder, scheme), implementation=implementation))
        torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * expected.abs().max().item())
    with model.disable_adapter():
        own = logits_of(model)
    assert torch.equal(own, logits_of(load_quantized(folder, scheme)))
    assert (own - expected).abs().max() > 0.02 * expected.abs().max()
    assert (own - logits_of(load(folder))).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", TRAINABLE)
def test_gradients_are_those_of_the_dequantized_model(folder, scheme):
    """Where weights alone are quantized; elsewhere there are some."""
    actual = router_gradients(adapted(load_quantized(folder, scheme)))
    assert len(actual) == 3 * 3
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in actual.values())
    if scheme is bitsandbytes_int8:
        return
    expected = router_gradients(adapted(dequantize(load_quantized(folder, scheme))))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


def test_the_commands_train_and_measure_over_a_quantized_base(folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w5 w6 w7", "answer": "w8"}\n' * 4)
    train = ["train", "--preset", "chats", "--model", folder, "--train_files", str(tmp_path / "rows.jsonl")]
    train += ["--keep_weight", "0", "--use_cpu", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert main([*train, "--load_in_4bit", "--eval_strategy", "steps"]) == 2
    assert "--eval_strategy: on a CPU" in capsys.readouterr().err
    measure = ["measure", "--adapter", str(tmp_path / "out"), "--items", "3", "--questions", "1"]
    losses = {}
    for option in ("--load_in_8bit", "--load_in_4bit"):
        assert main([*train, option, "--overwrite"]) == 0
        assert main([*measure, option, "--output_dir", str(tmp_path / "measured")]) == 0
        losses[option] = Result.load(tmp_path / "measured" / "facts_0.json").mean("loss")
    assert main([*measure, "--output_dir", str(tmp_path / "measured")]) == 0
    losses["none"] = Result.load(tmp_path / "measured" / "facts_0.json").mean("loss")
    assert len({*losses.values()}) == 3 and losses["none"] == pytest.approx(losses["--load_in_4bit"], abs=0.1)


class PacksForInference(nn.Linear):
    """Like layers that change the layout of their weight, for good, once they run where no gradient is needed."""

    packed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.packed |= not (torch.is_grad_enabled() and input.requires_grad)
        return super().forward(input)


def test_the_probe_leaves_layers_ready_for_training(folder):
    model = load(folder)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PacksForInference
    adapted(model)
    assert not any(layer.packed for layer in model.modules() if isinstance(layer, PacksForInference))
    logits_of(model)
    assert all(layer.packed for layer in model.modules() if isinstance(layer, PacksForInference))


@pytest.mark.parametrize("scheme", ALL)
def test_an_adapter_is_loaded_and_merged_and_the_weights_stay_quantized(folder, scheme, tmp_path):
    model = adapted(load_quantized(folder, scheme))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_quantized(folder, scheme), tmp_path / "adapter")
    assert router_state(loaded).keys() == router_state(model).keys()
    assert torch.equal(logits_of(loaded), expected)
    kind = type(model.get_base_model().model.layers[0].self_attn.q_proj.weight)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    if scheme is torchao_int4_packed:
        return  # torchao cannot save this format.
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged", device_map={"": "cpu"})
    assert type(loaded.model.layers[0].self_attn.q_proj.weight) is kind is not nn.Parameter
    assert torch.equal(logits_of(loaded), expected)


def write_gguf(model: nn.Module, file: Path) -> None:
    """The model in llama.cpp's format, matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp keeps the two halves that rotate together next to each other.
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        values = tensor.contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(folder, tmp_path):
    gguf_folder = tmp_path / "gguf"
    gguf_folder.mkdir()
    original = load(folder)
    write_gguf(original, gguf_folder / "tiny.gguf")

    def load_gguf():
        options = {}
        if hasattr(transformers, "GgufConfig"):  # Versions without it always dequantize.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return load(gguf_folder, gguf_file="tiny.gguf", dtype=torch.float32, **options)

    error = (logits_of(load_gguf()) - logits_of(original)).abs().mean() / logits_of(original).abs().mean()
    assert 0 < error < 0.05
    model = adapted(load_gguf())
    expected = logits_of(model)
    reference = logits_of(adapted(load_gguf(), implementation="reference"))
    torch.testing.assert_close(expected, reference, rtol=0, atol=1e-5 * reference.abs().max().item())
    assert all(gradient.abs().max() > 0 for gradient in router_gradients(model).values())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_gguf(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged")), expected)
