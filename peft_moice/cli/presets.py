"""Recipes for `peft-moice train`: defaults that any argument overrides."""

from typing import Any

_OURS: dict[str, Any] = {
    "loss_on": "answers",
    # None below the model's own: those damage text that is longer than the training prompts (docs/experiments.md).
    "angles": [1.0, 1.5, 2.0, 3.0, 4.0],
    "init": "identity",
    "aux_coef": 0.0,
    "keep_weight": 2.0,
    "per_device_train_batch_size": 1,
    "learning_rate": 5e-2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "logging_steps": 1,
}

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    # The recipe of examples/repair_lost_in_the_middle.py, with its facts hidden in passages.
    "retrieval": {
        **_OURS,
        "data_format": "documents",
        "documents_per_prompt": 8,
        "passage_words": 40,
        "questions": 8,
        "prompts": 240,
        "keep_tokens": 128,
        "learning_rate": 8e-2,
        "max_steps": 24,
    },
    # The same routers on chats, as often as they are given; what users say in them is the text that stays as it was.
    "chats": {**_OURS, "num_train_epochs": 1},
    # What the authors released for Llama-2-7B-chat (https://github.com/p1nksnow/MoICE); the routers' own settings are
    # MoICEConfig's defaults.
    "paper": {
        "loss_on": "all",
        "max_length": 4608,
        "sequences_per_step": 128,
        "max_steps": 7,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "aux_coef": 0.3,
        "dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_steps": 1,
    },
}
