"""What the paper did, by model and recipe, and where each value is from.

Sources: "script" is `training/train.sh` and `training/train-balance.py` of https://github.com/p1nksnow/MoICE (commits
042729e and 32a0102), "text" the paper (arXiv 2406.19598).
"""

from dataclasses import dataclass

from peft_moice.tuner.config import RELEASED_MULTIPLIERS


@dataclass(frozen=True)
class Model:
    """A model of the paper.

    Attributes:
        name: id on the Hub.
        angles: base angles as multiples of its own; K is their number.
        official_prompt: whether L-Eval's own script writes its prompts, and not the tokenizer's chat template.
    """

    name: str
    angles: tuple[float, ...] = tuple(RELEASED_MULTIPLIERS)
    official_prompt: bool = False


MODELS = {
    "llama2": Model("meta-llama/Llama-2-7b-chat-hf", official_prompt=True),  # angles, and K = N: script
    # The text names the models ("Mistral-7B-Instruct-8k"; the id is our reading); no source at hand has their angles.
    # These are ours, by the search after Attention Buckets: `peft-moice angles --rope_theta 1e4 --head_dim 128
    # --context_length 8192`, and for Qwen 1e6 and 32768. For Llama (4096) it finds 4 of the 7 that were released.
    "mistral": Model("mistralai/Mistral-7B-Instruct-v0.1", (1.0, 2.0, 2.15, 2.5, 1.6, 1.95, 2.05)),
    "qwen": Model("Qwen/Qwen1.5-7B-Chat", (1.0, 1.45, 3.0, 2.85, 1.95, 2.2, 2.8)),
}
"""Any other model gets Llama's multiples; `--angles` takes others."""

RECIPES = {
    # script: one router a layer. The balance loss of K = N is a constant; it counts padding, ours does not.
    "released": {"scope": "layer"},
    # text: a router for each head.
    "text": {"scope": "head"},
}
SCRIPT_TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token * 2 }}[INST]\n{{ bos_token }}"
SCRIPT_TEMPLATE += "{{ m.content }}\n[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
"""The chat template of the script for Llama-2: it writes the beginning of the text three times."""

TRAINING = ["--preset", "paper"]
"""Arguments of `peft-moice train`: 7 steps of 128 sequences of up to 4,608 tokens, loss on prompt and answer, AdamW at
1e-4, no weight decay, bfloat16, checkpointing. The script's warm-up is ignored by its constant schedule."""
SMALL_TRAINING = ["--max_steps", "1", "--sequences_per_step", "1", "--max_length", "2048", "--use_cpu", "True"]
SMALL_TRAINING += ["--bf16", "False"]
SMALL_ANGLES = 3
"""So many of the model's, since Attention Buckets reads everything once for each."""

TRAINING_DATA = "teknium/openhermes"
"""OpenHermes. Neither text nor script name its revision, nor which of its versions."""
LEVAL = ("L4NLP/LEval", "43b9dbf06c239360b183c76cb5d90ebe4f5e3070")
"""Data set of the Hub, and its revision."""

METHODS: dict[str, tuple[str, dict]] = {
    "base": ("base", {}),
    "moice": ("routers", {"from_equal": True, "balance": 0.3}),
    "lora": ("lora", {"equal_size": True}),
    "attention_buckets": ("attention_buckets", {}),
    "ms_poe": ("ms_poe", {}),
    "positional_interpolation": ("positional_interpolation", {}),
}
"""What a row of a table is: the file of `examples/research/methods` that makes it, and its options."""
TRAINED = ("moice", "lora")

QUOTED = [
    {
        "table": "leval",
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "method": "base",
        "source": "quoted: README of OpenLMLab/LEval, commit b939a8e",
        "values": dict(tpo=0.8289, quality=0.6485, coursera=0.5377, sci_fi=0.6953, gsm100=0.79, codeU=0.0222),
    },
    {
        "table": "mdqa",
        "model": "lmsys/longchat-13b-16k",
        "method": "base",
        "source": "quoted: EXPERIMENTS.md of nelson-liu/lost-in-the-middle, commit 76bdbb9",
        "values": {"20: first": 0.6859, "20: middle": 0.5533, "20: last": 0.5503},
    },
]
"""Figures of others, to test this code against. The sources at hand hold none of the paper's own tables, nor of
Pos2Distill's: a line here with the source "paper", and they appear."""


def model_named(name: str) -> Model:
    """The settings of a model by its short name or its id."""
    known = {**MODELS, **{model.name: model for model in MODELS.values()}}
    return known.get(name, Model(name))
