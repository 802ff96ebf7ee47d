"""What a user chooses with vLLM's `--additional-config`."""

from typing import Any

CACHE_OPTION = "moice_cache"
CACHES = ("folded", "rotating")
BACKEND_NAME = "MOICE_ROTATING"
"""Name of the attention backend that `moice_cache: rotating` chooses, in vLLM's enumeration."""


def chosen_cache(additional_config: Any, device_type: str) -> str:
    """How the cache keeps keys and values: `"folded"` (default), a copy per expert, or `"rotating"`, once.

    Args:
        additional_config: vLLM's dictionary of options for plugins.
        device_type: where the model runs, such as "cpu".

    Raises:
        ValueError: no such cache, or the device has none.
    """
    options = additional_config if isinstance(additional_config, dict) else {}
    cache = options.get(CACHE_OPTION, CACHES[0])
    if cache not in CACHES:
        raise ValueError(
            f"`{CACHE_OPTION}` in --additional-config is {cache!r}, but has to be one of {', '.join(CACHES)}. "
            "docs/serving.md says what they cost."
        )
    if cache == "rotating" and device_type != "cpu":
        raise ValueError(
            f"`{CACHE_OPTION}` is 'rotating', which runs on the CPU, but the model runs on {device_type!r}. Leave "
            "it out, and the cache keeps a copy of keys and values per base angle."
        )
    return str(cache)
