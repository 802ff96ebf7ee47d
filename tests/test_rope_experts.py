"""Routers that choose among ropes: YaRN, linear and another base beside the model's own."""

import copy
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import decide, layers_of, load, logits_of, save_tiny_model, token_ids
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, StaticCache

import peft_moice
from peft_moice import MoICEConfig
from peft_moice.standalone.vllm.folder import check_files
from peft_moice.tuner.saved import describe_saved

WINDOW = 32
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 1.0}
LONGROPE["long_factor"] = LONGROPE["short_factor"]
ROPES = [{}, LINEAR, YARN, {"rope_theta": 200000.0}]
IDS = token_ids(length=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("ropes"), max_position_embeddings=WINDOW)


def adapted(folder: str, ropes: list | None = None, **options):
    config = MoICEConfig(ropes=ropes or ROPES, **{"top_k": 2, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(load(folder), config).eval()
    decide(model)
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol * expected.abs().max().item())


def with_parameters(model, parameters: dict):
    """The family's own model with rope parameters over those of each layer type, and the same weights."""
    config = copy.deepcopy(model.config)
    for own in [config.rope_parameters] if "rope_theta" in config.rope_parameters else config.rope_parameters.values():
        own.update(parameters)
        if parameters.get("rope_type") in ("yarn", "longrope"):
            own["original_max_position_embeddings"] = config.max_position_embeddings
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3"])
def test_an_expert_alone_is_the_familys_own_model_with_its_rope(family, tmp_path):
    """Phi rotates a part of each head, Gemma 3 has angles by layer type."""
    folder = save_tiny_model(tmp_path, family, max_position_embeddings=WINDOW)
    ropes = [*ROPES, LONGROPE] if family == "phi" else ROPES
    model, chosen = adapted(folder, ropes, top_k=1), torch.zeros((), dtype=torch.long)

    def choose(router, args, logits):
        return torch.nn.functional.one_hot(chosen.expand(logits.shape[:-1]), len(ropes)) * 1e4

    for layer in layers_of(model):
        layer.moice_router["default"].register_forward_hook(choose)
    for index, parameters in enumerate(ropes):
        chosen.fill_(index)
        base = load(folder)
        expected = logits_of(with_parameters(base, parameters), IDS)
        close(logits_of(model, IDS), expected)
        if parameters:
            assert (expected - logits_of(base, IDS)).abs().max() > 1e-3 * expected.abs().max()


def frequencies(base: float = 10000.0) -> torch.Tensor:
    return base ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)


def yarn_frequencies(factor: float) -> torch.Tensor:
    """Peng et al., 2023, sections 3.2 and 3.3, with the bounds rounded as in their code."""
    bounds = [8 * math.log(WINDOW / (turns * 2 * math.pi)) / math.log(10000.0) for turns in (32, 1)]
    low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), 15)
    slow = ((torch.arange(8, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return frequencies() * (1 - slow) + frequencies() / factor * slow


def turned(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * inverse
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


@torch.no_grad()
def plain_attention(attention, router, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mixture of two of [`ROPES`] in float64, from the weights alone: `[B, S, E]`."""
    weight = {name: value.double() for name, value in attention.state_dict().items() if "proj" in name}
    gate, up, down = (router.state_dict()[f"{name}_proj"].double() for name in ("gate", "up", "down"))
    q, k, v = (
        (hidden.double() @ weight[f"{name}_proj.weight"].mT).unflatten(-1, (-1, 16)).transpose(1, 2) for name in "qkv"
    )
    k, v, own = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), turned(q, frequencies())
    logits = (torch.nn.functional.silu(own @ gate.mT) * (own @ up.mT)) @ down.mT
    kept = logits.topk(2, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(dim=-1))
    ropes = [frequencies(), frequencies() / 2, yarn_frequencies(4.0), frequencies(200000.0)]
    hidden_keys = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    output = 0
    for j, inverse in enumerate(ropes):
        scores = turned(q, inverse) @ turned(k, inverse).mT / 4 * (temperature**2 if j == 2 else 1)
        output = output + gates[..., j, None] * (scores.masked_fill(hidden_keys, -torch.inf).softmax(dim=-1) @ v)
    return output.transpose(1, 2).flatten(-2) @ weight["o_proj.weight"].mT


@pytest.mark.parametrize("temperature", [1.0, None], ids=["plain", "temperature"])
@pytest.mark.parametrize("implementation", ["reference", "delegated", "folded", "native", "auto"])
def test_a_mixture_equals_plain_attention_in_float64(implementation, temperature, folder):
    """Without `attention_factor`, YaRN scales its scores by (0.1 ln factor + 1)²."""
    yarn = {**YARN, "attention_factor": temperature}
    model = adapted(folder, [{}, LINEAR, yarn, ROPES[3]], implementation=implementation)
    layer, seen = layers_of(model)[1], {}
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, output=out[0]), with_kwargs=True)
    if implementation == "folded" and temperature is None:
        with pytest.raises(ValueError, match="attention_factor"):
            logits_of(model, IDS)
        return
    logits_of(model, IDS)
    scale = 0.1 * math.log(4) + 1 if temperature is None else temperature
    expected = plain_attention(layer.base_layer, layer.moice_router["default"], seen["hidden_states"], scale)
    close(seen["output"].double(), expected, 3e-5)


@pytest.mark.parametrize("implementation", ["folded", "native"])
def test_rules_by_position_without_a_scaling_are_tables_like_any(implementation, folder):
    rules = [{"query_positions": [0, 9]}, {"query_positions": [9, None], **YARN}]
    expected = adapted(folder, rules, implementation="reference")
    model = adapted(folder, rules, implementation=implementation)
    close(logits_of(model, IDS), logits_of(expected, IDS))


def test_gradients_reach_every_weight_of_the_routers_and_are_the_references(folder):
    gradients = []
    for implementation in ("reference", "auto"):
        model = adapted(folder, implementation=implementation)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "moice_router" in name])
    for expected, actual in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        close(actual, expected, 1e-4)


def test_saved_loaded_merged_combined_and_described(folder, tmp_path):
    model = adapted(folder)
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    yarn = {**YARN, "original_max_position_embeddings": WINDOW}
    assert (saved["rope_bases"], saved["ropes"]) == ([10000.0, LINEAR, yarn, 200000.0], None)
    words = (
        "10000; linear factor 2.0; yarn attention_factor 1.0 factor 4.0 original_max_position_embeddings 32; 200000"
    )
    assert words in describe_saved(str(tmp_path / "adapter"))["in_words"].values()
    assert words.replace("_", r"\_") in (tmp_path / "adapter" / "README.md").read_text()

    loaded = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, IDS), expected)
    bases = MoICEConfig(base_multipliers=[1.0, 3.0], task_type="CAUSAL_LM")
    loaded.add_adapter("bases", bases)
    decide(loaded, "bases", seed=1)
    for order in (["bases", "default"], ["default", "bases"]):
        loaded.add_weighted_adapter(order, [0.5, 0.5], "".join(order), combination_type="cat")
        assert loaded.peft_config["".join(order)].rope_bases == [10000.0, 30000.0, 200000.0, yarn, LINEAR]
    loaded.base_model.set_adapter(["default", "bases"])
    mean = logits_of(loaded, IDS)
    loaded.set_adapter("basesdefault")
    close(logits_of(loaded, IDS), mean, 1e-6)

    # Beside an extension, merging states a new length, from which ropes must not be made.
    peft_moice.extend(model, 4)
    expected = logits_of(model, IDS)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.max_position_embeddings == 4 * WINDOW
    close(logits_of(merged, IDS), expected, 1e-6)
    check_files(tmp_path / "merged")


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding_is_one_graph(folder):
    torch.compiler.reset()
    model, graphs = adapted(folder), CompileCounter()
    expected = logits_of(model, IDS)
    cache = StaticCache(config=model.config, max_cache_len=48)
    model(IDS[:, :37], past_key_values=cache)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for place in range(37, 40):
        close(compiled(IDS[:, place : place + 1], past_key_values=cache).logits[:, 0], expected[:, place])
    assert graphs.frame_count == 1
    torch.compiler.reset()


REFUSED = {
    "not the own rope first": ([LINEAR, {}], r"overlap.*\{\}"),
    "one twice": ([{}, LINEAR, dict(LINEAR)], "twice"),
    "an unknown rope type": ([{}, {"rope_type": "yarm"}], "'yarm'; choose one of"),
    "factors that change with the length": ([{}, {**LONGROPE, "long_factor": [9.0] * 4}], "same list as both"),
    "beyond the window alone": ([{"distances": [9, None]}, {"distances": [9, None], **LINEAR}], "two adapters"),
}


@pytest.mark.parametrize(("ropes", "reason"), REFUSED.values(), ids=REFUSED)
def test_ropes_that_are_refused(ropes, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        MoICEConfig(ropes=ropes)


def test_what_else_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`ropes` and .*base_multipliers.*both"):
        MoICEConfig(ropes=ROPES, base_multipliers=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"hold everywhere.*two adapters"):
        MoICEConfig(rope_bases=[10000.0, {**LINEAR, "query_positions": [8, None]}])
    with pytest.raises(ValueError, match="twice"):
        adapted(folder, [{}, {"rope_theta": 10000.0}])
    with pytest.raises(ValueError, match="first of `rope_bases`"):
        get_peft_model(load(folder), MoICEConfig(rope_bases=[20000.0, {}]))
    with pytest.raises(ValueError, match="llama3"):
        adapted(folder, [{}, {"rope_type": "llama3", "factor": 2.0}])
    own = {"rope_theta": 1e4, "original_max_position_embeddings": WINDOW, **LONGROPE, "long_factor": [9.0] * 4}
    phi3 = save_tiny_model(tmp_path, "phi3", rope_parameters=own, original_max_position_embeddings=WINDOW, head_dim=8)
    with pytest.raises(ValueError, match="'longrope' changes its angles"):
        adapted(phi3)
