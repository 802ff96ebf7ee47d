"""Whole models with routers built in, without PEFT. The folders that they are saved to import this name."""

from .models import MODEL_TYPE, MoICEAutoConfig, __getattr__  # noqa: F401  # classes by their names

__all__ = ["MODEL_TYPE", "MoICEAutoConfig"]
