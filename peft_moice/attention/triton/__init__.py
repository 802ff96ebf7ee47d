"""Triton kernels for CUDA. Nothing here imports Triton until the operator runs."""

from .interface import run, why_not

__all__ = ["run", "why_not"]
