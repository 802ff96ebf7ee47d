"""Compiles the kernels once per machine and loads them."""

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("attend.c", "differentiate.c", "decode.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("kernels.h", "panels.h"))
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno")
# Clang on macOS has no OpenMP of its own, and not every compiler knows every processor.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_SECONDS_TO_COMPILE = 300
SWITCH = "PEFT_MOICE_NATIVE"
"""Environment variable; "0" keeps the kernels from being compiled and used."""
FLAGS = "PEFT_MOICE_CFLAGS"
"""Environment variable with further flags for the compiler, which come last."""


_SIZES = "batch kv_heads group queries keys head_dim value_dim experts pairs query_start is_causal is_ordered type"
_FIELDS = {
    **dict.fromkeys(_SIZES.split(), "q"),
    **{"query": "P", "query_stride": "3q", "key": "P", "key_stride": "3q", "value": "P", "value_stride": "3q"},
    **{"gates": "P", "mask": "P", "mask_stride": "4q", "mask_is_boolean": "q"},
    **{"cos": "P", "sin": "P", "table_stride": "q", "order": "P", "scaling": "f", "far_from": "P", "factors": "P"},
    **{"output": "P", "scratch": "P"},
    **{"grad_output": "P", "picked": "P", "parts": "q"},
    **{"grad_query": "P", "grad_key": "P", "grad_value": "P", "grad_gates": "P"},
}
"""The fields of the C structure `problem` in their order, as `struct` writes them."""
_STRUCTURE = struct.Struct("@" + "".join(_FIELDS.values()))
_ENDS = itertools.accumulate((int(code[:-1] or 1) for code in _FIELDS.values()), initial=0)
_PLACES = {name: slice(*ends) for name, ends in zip(_FIELDS, itertools.pairwise(_ENDS), strict=True)}


class Structure:
    """The values of the C structure `problem`; faster to fill than a structure of ctypes.

    Args:
        values: of the first fields, in their order. The others are 0.
    """

    def __init__(self, *values: float):
        self._values: list[float] = [*values, *(0,) * (_PLACES["grad_gates"].stop - len(values))]

    def set(self, fields: dict[str, Any]) -> None:
        """Set fields by their names: numbers, or as many as the field has places."""
        for name, value in fields.items():
            self._values[_PLACES[name]] = value if isinstance(value, tuple) else (value,)

    def packed(self) -> bytes:
        """The structure in memory, for the kernels to read."""
        return _STRUCTURE.pack(*self._values)


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0"
    try:
        return _compiled_once()
    except Exception as error:  # whatever a machine has in store, PyTorch's operations remain
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)
        logger.warning(
            "MoICE's kernels for the CPU cannot be used, and PyTorch's operations, which can, are slower: %s. Install "
            "a C compiler (gcc or clang) or name one in the environment variable CC; %s=0 does without this warning.",
            *(reason, SWITCH),
        )
        return reason


def _compiled_once() -> ctypes.CDLL:
    """The library that was compiled before, or else now."""
    compiler = _compiler()
    target = _target(compiler)
    if target is None:
        # Once loaded, a library does not need its file.
        with tempfile.TemporaryDirectory() as folder:
            return _opened(_compile(compiler, Path(folder)))
    if _is_intact(target):
        try:
            return _opened(target)
        except (OSError, AttributeError) as error:
            logger.info("%s cannot be loaded and is compiled anew: %s", target, error)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = _compile(compiler, Path(folder))
        library = _opened(made)
        # Other processes may do the same at the same time. A checksum that does not fit costs them a compilation.
        checksum = made.with_suffix(".sha256")
        checksum.write_text(_digest(made), encoding="ascii")
        os.replace(checksum, _checksum_of(target))
        os.replace(made, target)
    return library


def _compiler() -> list[str]:
    """The command of the C compiler, perhaps with options."""
    compiler = shlex.split(os.environ.get("CC", ""))
    compiler = compiler or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler or not shutil.which(compiler[0]):
        raise RuntimeError("there is no C compiler (cc, gcc, clang, or the one that the variable CC names)")
    return compiler


def _target(compiler: list[str]) -> Path | None:
    """Where the compiled library is kept as long as source, compiler and processor stay the same.

    None where there is no folder that belongs to this user and that nobody else can write.
    """
    version = _run([*compiler, "--version"]).stdout
    parts = (
        *(path.read_bytes() for path in (*_HEADERS, *_SOURCES)),
        repr((compiler, version, _FLAGS, _OPTIONAL_FLAGS, _own_flags(), platform.machine(), _processor())).encode(),
    )
    name = f"kernels-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError) as error:
        logger.info("MoICE's kernels cannot be kept and are compiled in every process: %s", error)
        return None
    if not writable or not _is_private(folder):
        logger.info("MoICE's kernels are compiled in every process: others can write %s, or this user cannot", folder)
        return None
    return folder / name


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


def _is_private(path: Path) -> bool:
    """Whether a file or folder is this user's own and nobody else can write it."""
    status = path.stat()
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_intact(library: Path) -> bool:
    """Whether the file is as it was compiled here."""
    try:
        expected = _checksum_of(library).read_text(encoding="ascii")
        return _is_private(library) and _digest(library) == expected
    except (OSError, ValueError):
        return False


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    problem = ctypes.c_char_p
    for name in ("attend", "decode", "differentiate"):
        for function, result in ((name, None), (f"{name}_floats", ctypes.c_int64)):
            getattr(library, function).argtypes = [problem, ctypes.c_int64]
            getattr(library, function).restype = result
    library.count_parts.argtypes, library.count_parts.restype = [problem, ctypes.c_int64], ctypes.c_int64
    return library


def _compile(compiler: list[str], folder: Path) -> Path:
    """Compile into `folder` with as many of the optional flags as the compiler takes."""
    made = folder / "kernels.so"
    for optional in _OPTIONAL_FLAGS:
        line = [*compiler, *_FLAGS, *optional, *_own_flags(), *map(str, _SOURCES), "-o", str(made), "-lm"]
        outcome = _run(line)
        if outcome.returncode == 0:
            logger.info("Compiled MoICE's kernels for the CPU: %s", shlex.join(line))
            made.chmod(0o700)
            return made
    raise RuntimeError(f"{shlex.join(line)} failed: {outcome.stderr.strip()[:500]}")


def _own_flags() -> list[str]:
    return shlex.split(os.environ.get(FLAGS, ""))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS_TO_COMPILE,
    )


def _processor() -> str:
    """What tells processors apart that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
