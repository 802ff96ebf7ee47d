"""Where what was compiled for, and found out about, this machine is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`peft_moice` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`), made so that only the user can write.

    Raises:
        OSError: it cannot be made.
        RuntimeError: there is no home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_moice"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
