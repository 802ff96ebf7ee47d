"""Adapters and their model cards on the Hugging Face Hub."""

from .push import add_to_card, push_to_hub, write_model_card

__all__ = ["add_to_card", "push_to_hub", "write_model_card"]
