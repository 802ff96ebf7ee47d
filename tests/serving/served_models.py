"""Tiny merged models for vLLM, what transformers computes with them, and how both are compared."""

import contextlib
import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loading import load_model
from peft import get_peft_model
from tiny_models import VOCABULARY, decide, load, save_tiny_model, wide_config
from transformers import AutoTokenizer

from peft_moice import MoICEConfig
from peft_moice.routing.mixture import RouterRecord

ROOT = Path(__file__).parents[2]
LOG_PROBABILITY_BOUND = 5e-4
"""Largest difference of log-probabilities to transformers' in float32."""
NEAR_TIE = 1e-5
"""Logits of a router that lie nearer than this may fall to either side; float32 errors reach a tenth of it."""
SHAPE = {
    "hidden_size": 64,
    "head_dim": 32,  # the smallest that vLLM's kernels for the CPU take
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}

PICKING = {"top_k": 2}
MIXING = {"top_k": 4, "router_scope": "head", "init_weights": "identity"}
ROPES = [
    {"query_positions": [0, 100]},
    {"query_positions": [100, 205], "rope_type": "linear", "factor": 2.0},
    {"query_positions": [205, None], "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
]
"""The prompts of 97 and 200 tokens come to others in their answers."""
WITHOUT_RANGES = [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}]
ALL_MODELS = {
    f"{family} {name}": (family, {}, routers)
    for family in ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3")
    for name, routers in (("K < N, per layer", PICKING), ("K = N, per head", MIXING))
} | {
    "some layers": ("llama", {}, {"layers_to_transform": [1]}),
    "ropes by position": ("llama", {}, {"ropes": ROPES}),
    "ropes by position around routers": ("qwen3", {}, {**MIXING, "ropes": ROPES}),
    "routers over ropes": ("llama", {}, {"base_multipliers": None, "rope_bases": [{}, *WITHOUT_RANGES], "top_k": 2}),
    "one key head": ("llama", {"num_key_value_heads": 1}, {"top_k": 1, "router_scope": "head"}),
}
"""Per name: family, what of its shape differs, and the adapter's config."""


@dataclass
class Served:
    """A merged model on disk, in transformers, and the base that it came from."""

    folder: str
    merged: torch.nn.Module
    base: torch.nn.Module
    records: list[RouterRecord] = field(default_factory=list)

    def take(self, layer: torch.nn.Module, records: list[RouterRecord]) -> None:
        self.records += records

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> tuple[torch.Tensor, int]:
        """Log-probabilities `[S, V]` of the token after each of `ids`, and the first place at a router's near-tie."""
        for module in self.merged.modules():
            if hasattr(module, "recorder"):
                module.recorder = self
        self.records.clear()
        logits = self.merged(torch.tensor([ids])).logits[0]
        places = [first_near_tie(record) for record in self.records]
        return logits.log_softmax(-1), min([len(ids), *places])

    def draw(self, *lengths: int, begin: list[int] | None = None, new_tokens: int = 0) -> list[list[int]]:
        """Random prompts in which no router comes near a tie, nor in the first `new_tokens` of their answers.

        Args:
            lengths: of the prompts, behind `begin`.
            begin: what all of them begin with.
            new_tokens: how much of the greedy answer is looked at.
        """
        generator, prompts = torch.Generator().manual_seed(len(lengths)), []
        while len(prompts) < len(lengths):
            drawn = torch.randint(2, VOCABULARY, (lengths[len(prompts)],), generator=generator).tolist()
            ids = prompt = [*(begin or []), *drawn]
            for _ in range(new_tokens):
                ids = [*ids, int(self.log_probabilities(ids)[0][-1].argmax())]
            if self.log_probabilities(ids)[1] == len(ids):
                prompts.append(prompt)
        return prompts

    @torch.no_grad()
    def base_log_probabilities(self, ids: list[int]) -> torch.Tensor:
        return self.base(torch.tensor([ids])).logits[0].log_softmax(-1)


def first_near_tie(record: RouterRecord) -> int:
    """The first place whose K-th and next expert lie within [`NEAR_TIE`] of each other; S where there is none."""
    top_k, logits = record.share.spec.top_k, record.logits[0]  # [H, S, N]
    if top_k == logits.shape[-1]:
        return logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    near = ((ordered[..., top_k - 1] - ordered[..., top_k]) < NEAR_TIE).any(dim=0).nonzero()
    return int(near[0]) if len(near) else logits.shape[1]


def serve_on_disk(folder: Path, family: str, shape: dict, adapter: dict) -> Served:
    """Write a tiny merged model of `family`, whose predictions depend on what attention found."""
    base_folder = save_tiny_model(folder / "base", family, **{**SHAPE, **shape})
    base = load(base_folder)
    torch.nn.init.normal_(base.get_output_embeddings().weight, std=0.5)
    base.save_pretrained(base_folder)
    routers = {name: value for name, value in adapter.items() if name != "ropes"}
    ropes = [MoICEConfig(ropes=adapter["ropes"])] if "ropes" in adapter else []
    first, *others = ropes if ropes and not routers else [wide_config(**routers), *ropes]
    model = get_peft_model(load(base_folder), first).eval()
    decide(model)
    for other in others:
        model.add_adapter("ropes", other)
        model.base_model.set_adapter(["default", "ropes"])
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder / "merged")
    return as_served(folder / "merged", base)


def serve_smollm2(folder: Path) -> tuple[Served, list[int]]:
    """SmolLM2-135M with firm routers over five angles on disk, and the first 1,000 tokens of a text."""
    base, tokenizer = load_model(None)
    model = get_peft_model(base, wide_config(base_multipliers=[1.0, 0.25, 0.5, 2.0, 4.0], top_k=5)).eval()
    decide(model)
    ids = tokenizer((ROOT / "README.md").read_text()).input_ids[:1000]
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return as_served(folder, load_model(None)[0].eval()), ids


def as_served(folder: Path, base: torch.nn.Module) -> Served:
    """The model in `folder`, in transformers. Has to be called before vLLM builds a model of its family."""
    merged = load(str(folder), dtype=torch.float32, attn_implementation="eager")
    for model in (merged, base):
        # vLLM gives transformers' classes another `__call__`, which asks for this.
        model.get_decoder().do_not_compile = True
    return Served(str(folder), merged, base)


@contextlib.contextmanager
def engine(folder: str, **options):
    """vLLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, **options}
    llm = None
    try:
        llm = LLM(folder, distributed_executor_backend="uni", disable_log_stats=True, **options)
        yield llm
    finally:
        if llm is not None:
            # The traceback of a failed test would keep the engine, and no other could start.
            vars(llm).clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm, prompts: list[list[int]], max_tokens: int = 16, with_prompts: bool = True, **options):
    """Greedy continuations. Log-probabilities of prompts make vLLM compute them anew, without its prefix cache."""
    from vllm import SamplingParams

    asked = {"prompt_logprobs": 1} if with_prompts else {}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=1, **asked)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, **options)


def assert_as_transformers(served: Served, outputs) -> None:
    """vLLM's outputs are transformers' up to the first near-tie of a router, and hardly anything lies beyond those."""
    num_all = num_compared = 0
    for output in outputs:
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        ids = prompt + answer
        expected, limit = served.log_probabilities(ids)
        found = {
            len(prompt) + index - 1: values[token].logprob
            for index, (token, values) in enumerate(zip(answer, output.outputs[0].logprobs, strict=True))
        }
        for index, values in enumerate(output.prompt_logprobs or []):
            if values is not None:
                found[index - 1] = values[ids[index]].logprob
        places = torch.tensor([place for place in found if place < limit], dtype=torch.long)
        num_all, num_compared = num_all + len(found), num_compared + len(places)
        values = torch.tensor([found[int(place)] for place in places])
        tokens = torch.tensor(ids)[places + 1]
        torch.testing.assert_close(values, expected[places, tokens], rtol=0, atol=LOG_PROBABILITY_BOUND)
        generated = places[places >= len(prompt) - 1]
        assert torch.equal(torch.tensor(ids)[generated + 1], expected[generated].argmax(-1))
    assert num_compared > 0.9 * num_all, f"{num_all - num_compared} of {num_all} places lie beyond near-ties"


def assert_routers_matter(served: Served, ids: list[int]) -> None:
    """The base model's predictions are far from the merged model's, so that one cannot pass for the other."""
    difference = served.base_log_probabilities(ids) - served.log_probabilities(ids)[0]
    assert difference.abs().max() > 100 * LOG_PROBABILITY_BOUND
