"""What serving a merged model costs: requests at once, in vLLM and in transformers' continuous batching.

    python examples/benchmarks/measure_serving.py make outputs/serving
    python examples/benchmarks/measure_serving.py run outputs/serving

`make` writes SmolLM2-135M-Instruct and the same with routers over five base angles (K = N). Their weights are random,
because what they decide changes no cost. `run` sends eight prompts of 256 tokens that begin differently, asks for 32
tokens each, and prints a table in Markdown. Every row is a process of its own, and its first requests are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ANGLES = [1.0, 0.25, 0.5, 2.0, 4.0]
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 8, 256, 32
CACHE_GIB = 1
ROWS = {
    "vLLM, base": ("vllm", "base"),
    "vLLM, merged": ("vllm", "merged"),
    "transformers, base": ("transformers", "base"),
    "transformers, merged": ("transformers", "merged"),
}


def make(folder: Path) -> None:
    sys.path.append(str(ROOT / "examples"))
    from loading import load_model
    from peft import get_peft_model

    from peft_moice import MoICEConfig

    base, tokenizer = load_model(None)
    base.save_pretrained(folder / "base")
    config = MoICEConfig(base_multipliers=ANGLES, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).merge_and_unload().save_pretrained(folder / "merged")
    for name in ("base", "merged"):
        tokenizer.save_pretrained(folder / name)


def prompts(folder: Path, round_index: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)((ROOT / "README.md").read_text()).input_ids
    # Each begins with a token of its own, so that no round finds its beginnings in a cache.
    return [[1000 + round_index * REQUESTS + i, *ids[i * 60 :][: PROMPT_TOKENS - 1]] for i in range(REQUESTS)]


def run_vllm(folder: Path) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    cache = llm.llm_engine.vllm_config.cache_config

    def ask(round_index: int, new_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        requests = [{"prompt_token_ids": ids} for ids in prompts(folder, round_index)]
        start = time.perf_counter()
        llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - start

    return {**timed(ask), "cached": cache.num_gpu_blocks * cache.block_size}


def run_transformers(folder: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    import peft_moice  # noqa: F401  # reads merged models

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def ask(round_index: int, new_tokens: int) -> float:
        requests = prompts(folder, round_index)
        start = time.perf_counter()
        model.generate_batch(
            inputs=requests,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=256, page_size=32, max_batch_tokens=2048),
            progress_bar=False,
        )
        return time.perf_counter() - start

    return timed(ask)


def timed(ask) -> dict[str, float]:
    """Tokens per second of prompts, and of answers once prompts are read."""
    ask(0, 2)
    reading = ask(1, 1)
    all_of_it = ask(2, NEW_TOKENS)
    return {
        "prompt": REQUESTS * PROMPT_TOKENS / reading,
        "answer": REQUESTS * (NEW_TOKENS - 1) / (all_of_it - reading),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path, help="where the models are")
    parser.add_argument("--only", choices=ROWS, help="run one row in this process, and print it as JSON")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    elif args.only:
        engine, name = ROWS[args.only]
        run = run_vllm if engine == "vllm" else run_transformers
        print(json.dumps(run(args.folder / name)))
    else:
        print(
            "| | prompt tokens per second | answer tokens per second | tokens in 1 GiB of cache |\n|---|---|---|---|"
        )
        for row in ROWS:
            environment = {
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_LOGGING_LEVEL": "ERROR",
            }
            command = [sys.executable, __file__, "run", str(args.folder), "--only", row]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(output.strip().splitlines()[-1])
            cached = f"{found['cached']:,}" if "cached" in found else ""
            print(f"| {row} | {found['prompt']:.0f} | {found['answer']:.0f} | {cached} |", flush=True)


if __name__ == "__main__":
    main()
