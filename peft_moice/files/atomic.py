"""Files that are there as a whole or not at all, whenever the process is killed and however full the disk is."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAGING = ".peft_moice-saving-"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, in UTF-8. Until all of it is on the disk, what was at `path` stays there.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    with staged(path.parent) as staging, open(staging / path.name, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged(folder: Path, obsolete: str | None = None) -> Iterator[Path]:
    """A new folder inside of `folder` to write to; its files replace those of `folder` at the end of the block.

    While the block runs, `folder` stays as it was, also where the block raises or the process is killed. The files
    then come into their places one by one, each as a whole. Only a kill between two of these renames can leave files
    of both; what a killed process had staged is left in a hidden folder, which nothing reads.

    Args:
        folder: an existing folder.
        obsolete: a regular expression. Files of `folder` whose whole name matches it, and that the block has not
            written anew, are removed in the end.

    Raises:
        OSError: `folder` cannot be written to.
    """
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=_STAGING))
    try:
        yield staging
        files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        for file in files:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _give_usual_mode(staging / file, like=target)
            os.replace(staging / file, target)
        for path in folder.iterdir() if obsolete is not None and files else ():
            if re.fullmatch(obsolete or "", path.name) and Path(path.name) not in files and path.is_file():
                path.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _give_usual_mode(file: Path, like: Path) -> None:
    """Temporary files are private; give `file` the mode of the one it replaces, or that of any new file."""
    try:
        mode = like.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    file.chmod(mode)
