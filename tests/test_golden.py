"""Equality with numbers that the official code computed (see golden/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moice import MoICEConfig, load_official_checkpoint
from peft_moice.attention import IMPLEMENTATIONS

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL_NAMES = {"gate_proj": "gate_1", "down_proj": "gate_2", "up_proj": "gate_3"}


@dataclass
class Golden:
    tensors: dict[str, torch.Tensor]
    settings: dict

    def __init__(self, file: Path):
        with safe_open(file, "pt") as content:
            self.settings = {k: json.loads(v) for k, v in content.metadata().items() if k != "source"}
            self.tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {k.removeprefix("weight/"): v for k, v in self.tensors.items() if k.startswith("weight/")}

    def base_model(self) -> LlamaForCausalLM:
        shape = dict(self.settings["config"])
        rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
        result = model.load_state_dict(self.weights, strict=False)
        assert not result.missing_keys
        return model

    def config(self, **overrides) -> MoICEConfig:
        fields = {"rope_bases": self.settings["bases"], "top_k": self.settings["topk"]}
        fields["router_aux_loss_coef"] = self.settings["router_aux_loss_coef"]
        return MoICEConfig(**{**fields, **overrides})

    def model(self, implementation: str) -> PeftModel:
        return load_official_checkpoint(self.base_model(), self.weights, self.config(implementation=implementation))


@pytest.fixture(params=["gqa_top1", "gqa_top3", "mha_top7"])
def golden(request) -> Golden:
    return Golden(GOLDEN / f"{request.param}.safetensors")


@pytest.fixture(params=sorted(set(IMPLEMENTATIONS) - {"triton"}))
def implementation(request) -> str:
    return request.param


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=0, atol=tolerance)


def test_forward_loss_and_gradients(golden, implementation):
    model = golden.model(implementation).train()
    outputs = model(input_ids=golden["input_ids"], labels=golden["input_ids"], output_router_logits=True)
    assert_close(outputs.logits, golden["logits"])
    assert_close(outputs.aux_loss, golden["aux_loss"])
    # The official code adds the balance loss even where all experts are kept and it is a constant.
    keeps_all = golden.settings["topk"] == len(golden.settings["bases"])
    constant = golden.settings["router_aux_loss_coef"] * outputs.aux_loss if keeps_all else 0.0
    assert_close(outputs.loss + constant, golden["loss"])
    assert len(outputs.router_logits) == 2
    for index, logits in enumerate(outputs.router_logits):
        expected = golden[f"router_logits/{index}"].transpose(1, 2)
        # They reach 84 in magnitude, where float32 steps are 8e-6: a bound relative to the largest.
        assert_close(logits, expected, tolerance=2e-6 * expected.abs().max().item())

    outputs.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    for name, parameter in trained.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".moice_router.default.")
        expected = golden[f"grad/{module}.{OFFICIAL_NAMES[part]}.weight"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
@torch.no_grad()
def test_cached_decoding(golden, implementation):
    model = golden.model(implementation).eval()
    input_ids = golden["input_ids"]
    prefill = input_ids.shape[1] - golden.settings["decode_steps"]
    outputs = model(input_ids=input_ids[:, :prefill], use_cache=True)
    logits = [outputs.logits]
    for position in range(prefill, input_ids.shape[1]):
        step = input_ids[:, position : position + 1]
        outputs = model(input_ids=step, past_key_values=outputs.past_key_values, use_cache=True)
        logits.append(outputs.logits)
    decoded = torch.cat(logits, dim=1)
    assert_close(decoded, golden["decode_logits"])
    assert_close(decoded, model(input_ids=input_ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_head_scope_with_equal_weights_is_the_shared_router(golden, implementation):
    shared = golden.model(implementation).eval()
    per_head = load_official_checkpoint(golden.base_model(), golden.weights, golden.config())
    per_head.add_adapter("head", golden.config(router_scope="head", implementation=implementation))
    per_head.set_adapter("head")
    for layer in (module for module in per_head.modules() if hasattr(module, "moice_router")):
        source, target = layer.moice_router["default"], layer.moice_router["head"]
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name).expand_as(parameter))
    input_ids = golden["input_ids"]
    assert_close(per_head.eval()(input_ids).logits, shared(input_ids).logits)


@pytest.fixture
def released() -> Golden:
    return Golden(GOLDEN / "gqa_top1.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_official_checkpoints(released, tmp_path, suffix, sharded):
    save = save_file if suffix == ".safetensors" else torch.save
    if sharded:
        names = list(released.weights)
        shards = {f"model-{i}{suffix}": names[i::2] for i in range(2)}
        for file, keys in shards.items():
            save({key: released.weights[key] for key in keys}, tmp_path / file)
        index = {key: file for file, keys in shards.items() for key in keys}
        (tmp_path / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save(released.weights, tmp_path / f"model{suffix}")
    loaded = load_official_checkpoint(released.base_model(), tmp_path, released.config())
    expected = dict(released.model("auto").named_parameters())
    routers = {name: parameter for name, parameter in loaded.named_parameters() if "moice_router" in name}
    assert len(routers) == 6 and all(torch.equal(parameter, expected[name]) for name, parameter in routers.items())
    if sharded:
        (tmp_path / f"model-1{suffix}").unlink()
        with pytest.raises(FileNotFoundError, match=rf"model-1\{suffix}"):
            load_official_checkpoint(released.base_model(), tmp_path, released.config())


def test_pickled_code_is_refused(released, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"x.gate_1.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_official_checkpoint(released.base_model(), tmp_path, released.config())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("left_out", "config", "shape", "message"),
    [
        (".gate_", {}, {}, "no MoICE routers"),
        (".layers.1.self_attn.gate_", {}, {}, r"missing \['model\.layers\.1"),
        ("no part", {"rope_bases": [1e4, 2e4], "top_k": 2}, {}, "7 angles, but the config has 2"),
        ("no part", {}, {"head_dim": 32}, r"\(7, 32\) in the model and \(7, 16\)"),
    ],
)
def test_official_checkpoints_that_do_not_fit(released, left_out, config, shape, message):
    weights = {name: weight for name, weight in released.weights.items() if left_out not in name}
    sizes = {**released.settings["config"], **shape}
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    base = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(base, weights, released.config(**config))
