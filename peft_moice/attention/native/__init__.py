"""Kernels in C for the CPU, compiled on the user's machine when they are first wanted."""

from .native import run, why_not

__all__ = ["run", "why_not"]
