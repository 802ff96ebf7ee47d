"""vLLM computes what transformers computes: families, routers, caches, batches. Engines run in this process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from served_models import (
    ALL_MODELS,
    assert_as_transformers,
    assert_routers_matter,
    engine,
    generate,
)

BLOCK = 128
"""Tokens per block of vLLM's cache on the CPU, the unit in which beginnings are shared."""


@pytest.mark.parametrize("name", ALL_MODELS)
def test_as_transformers(served, name):
    """Six sequences at once, prompts in pieces of 96 tokens; then two that begin as others did."""
    model = served[name]
    prompts = model.draw(3, 40, 95, 97, 200, 500)
    shared = model.draw(30, 70, begin=prompts[-1][: 3 * BLOCK], new_tokens=16)
    assert_routers_matter(model, prompts[-1])
    with engine(model.folder, max_num_batched_tokens=96, max_num_seqs=6) as llm:
        outputs = generate(llm, prompts)
        assert_as_transformers(model, outputs)
        outputs = generate(llm, shared, with_prompts=False)
        assert [output.num_cached_tokens for output in outputs] == [3 * BLOCK] * 2
        assert_as_transformers(model, outputs)


def test_preemption(served):
    """Eight sequences that grow beyond the cache: some are taken out and computed again."""
    model = served["llama K = N, per head"]
    options = {"num_gpu_blocks_override": 9, "max_model_len": 512, "max_num_seqs": 8}
    with engine(model.folder, **options) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
        outputs = generate(llm, model.draw(*[120] * 8), max_tokens=40, with_prompts=False)
        assert preempted
        assert_as_transformers(model, outputs)


def test_a_real_model(smollm2):
    """SmolLM2-135M under five angles, at 1,000 tokens of text."""
    served, ids = smollm2
    assert_routers_matter(served, ids)
    with engine(served.folder, max_num_batched_tokens=256, max_model_len=1100) as llm:
        assert_as_transformers(served, generate(llm, [ids]))


def test_compiled(served):
    model = served["qwen3 K = N, per head"]
    with engine(model.folder, enforce_eager=False) as llm:
        assert_as_transformers(model, generate(llm, model.draw(5, 300)))


def test_half_precision_keeps_routers_exact(served):
    """In bfloat16 the routers stay in float32, as transformers keeps them."""
    model = served["llama K = N, per head"]
    with engine(model.folder, dtype="bfloat16") as llm:
        dtypes = llm.apply_model(lambda m: {p.dtype for name, p in m.named_parameters() if ".moice_routers." in name})
        (output,) = generate(llm, model.draw(200))
    assert dtypes == [{torch.float32}]
    ids = list(output.prompt_token_ids)
    expected = model.log_probabilities(ids)[0][torch.arange(199), torch.tensor(ids[1:])]
    found = torch.tensor([values[ids[i]].logprob for i, values in enumerate(output.prompt_logprobs) if values])
    base = model.base_log_probabilities(ids)[torch.arange(199), torch.tensor(ids[1:])]
    assert (found - expected).abs().median() < 0.2 * (base - expected).abs().median()


@pytest.mark.parametrize("name", ["llama K < N, per layer", "llama K = N, per head"])
def test_weights_are_loaded_anew(served, name):
    """From the files, and one by one, as trainers that hold an engine send them."""
    model = served[name]
    (prompt,) = model.draw(200)
    router = "model.layers.1.self_attn.moice_routers.0.up_proj"
    weight = load_file(f"{model.folder}/model.safetensors")[router]
    with engine(model.folder, enable_prefix_caching=False) as llm:

        def send(value):
            return llm.apply_model(lambda m: m.load_weights([(router, value)]))

        llm.collective_rpc("reload_weights")
        (before,) = generate(llm, [prompt])
        assert_as_transformers(model, [before])
        assert send(torch.zeros_like(weight)) == [{router}]
        (without,) = generate(llm, [prompt])
        assert without.prompt_logprobs != before.prompt_logprobs
        send(weight)
        (after,) = generate(llm, [prompt])
        assert after.prompt_logprobs == before.prompt_logprobs


def test_lora_over_a_merged_model(with_lora, served):
    from vllm.lora.request import LoRARequest

    folder, model = with_lora
    plain = served["llama K < N, per layer"]
    prompts = [model.draw(5)[0], *plain.draw(60, 300)]
    difference = model.log_probabilities(prompts[-1])[0] - plain.log_probabilities(prompts[-1])[0]
    assert difference.abs().max() > 0.1
    with engine(model.folder, enable_lora=True, max_lora_rank=8) as llm:
        assert_as_transformers(plain, generate(llm, prompts))
        assert_as_transformers(model, generate(llm, prompts, lora_request=LoRARequest("lora", 1, folder)))


def test_a_moice_adapter_is_no_lora(served):
    from vllm.lora.request import LoRARequest

    adapter = f"{served['llama K < N, per layer'].folder}/../adapter"
    with (
        engine(served["llama K < N, per layer"].folder, enable_lora=True) as llm,
        pytest.raises(Exception, match=r"(?i)lora"),
    ):
        generate(llm, [[5, 6, 7]], lora_request=LoRARequest("moice", 1, adapter))


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


@pytest.fixture
def copied(served, tmp_path):
    """A copy of a merged model's folder, to be damaged."""
    return shutil.copytree(served["llama K < N, per layer"].folder, tmp_path / "copy")


def start(folder, **options):
    with engine(str(folder), **options):
        raise AssertionError("the model was served")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}},
            r"several dimensions \(mRoPE\)",
        ),
        ({"architectures": ["MoICELlamaForSequenceClassification"]}, "only causal language models"),
    ],
)
def test_what_is_not_served_says_why(copied, changes, reason):
    change_config(copied, **changes)
    with pytest.raises(ValueError, match=f"not served by vLLM: .*{reason}"):
        start(copied)


def test_the_plain_backend_of_vllm_does_not_take_a_merged_model(served):
    with pytest.raises(Exception, match=r"(?i)not a registered model|MoICE"):
        start(served["llama K < N, per layer"].folder, model_impl="transformers")


def test_options_that_are_refused(served):
    folder = served["llama K < N, per layer"].folder
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="its rope type is 'dynamic', whose angles change"):
        start(folder, hf_overrides={"rope_parameters": dynamic})


def test_a_cut_file(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was copied in part"):
        start(copied)


def test_routers_of_another_shape(copied):
    weights = load_file(copied / "model.safetensors")
    name = "model.layers.1.self_attn.moice_routers.0.down_proj"
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    # vLLM loads decoders, whose names lack the part that their owner gives them.
    with pytest.raises(ValueError, match=rf"{name.removeprefix('model.')} of shape \(3, 4\).*\(4, 4\)"):
        start(copied)


def test_routers_that_are_not_finite(copied):
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.self_attn.moice_routers.0.up_proj"][0, 0] = float("nan")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.moice_routers\.0\.up_proj with values .*not finite"):
        start(copied)


def test_a_router_that_is_missing(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.2.self_attn.moice_routers.0.up_proj"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of routers.*model\.layers\.2\.self_attn.*up_proj"):
        start(copied)


def test_other_models_are_left_to_vllm(served):
    """A plain model is served as ever beside the plugin."""
    model = served["llama K < N, per layer"]
    with engine(f"{model.folder}/../base") as llm:
        (output,) = generate(llm, model.draw(200))
    ids = list(output.prompt_token_ids)
    expected = model.base_log_probabilities(ids)[torch.arange(199), torch.tensor(ids[1:])]
    found = torch.tensor([values[ids[i]].logprob for i, values in enumerate(output.prompt_logprobs) if values])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)
