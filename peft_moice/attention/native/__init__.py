"""Kernels in C for the CPU, compiled on the user's machine when they are first wanted."""

from .native import native, why_not_native

__all__ = ["native", "why_not_native"]
