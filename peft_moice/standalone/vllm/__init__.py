"""Merged models in vLLM, which finds [`plugin.register`] by itself, through the entry point `vllm.general_plugins`.

Nothing here is imported by the rest of the package, and only vLLM imports the modules that need it.
"""
