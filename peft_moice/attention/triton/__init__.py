"""Triton kernels for CUDA. Nothing here imports Triton until the operator runs."""

from .interface import triton_attention, why_not_triton

__all__ = ["triton_attention", "why_not_triton"]
