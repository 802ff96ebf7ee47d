"""Merged models in inference servers: a plugin for vLLM, and a launcher for transformers' own server.

vLLM finds [`plugin.register`] by itself, through the entry point `vllm.general_plugins`. Nothing here is imported by
the rest of the package, and only vLLM imports the modules that need it.
"""
