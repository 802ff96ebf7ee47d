"""Compiles `kernels.c` once per machine and loads it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno")
# Clang on macOS has no OpenMP of its own, and not every compiler knows every processor.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
SWITCH = "PEFT_MOICE_NATIVE"
"""Environment variable; "0" keeps the kernels from being compiled and used."""


class Problem(ctypes.Structure):
    """The C structure of the same name."""

    Strides = ctypes.c_int64 * 3
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "group", "queries", "keys", "head_dim")),
        *((name, ctypes.c_int64) for name in ("value_dim", "experts", "pairs", "query_start", "is_causal")),
        *((name, ctypes.c_int64) for name in ("tile_rows", "single_tile_rows", "is_ordered")),
        ("query", ctypes.c_void_p),
        ("query_stride", Strides),
        ("key", ctypes.c_void_p),
        ("key_stride", Strides),
        ("value", ctypes.c_void_p),
        ("value_stride", Strides),
        ("gates", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_stride", Strides),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("output", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("grad_output", ctypes.c_void_p),
        ("picked", ctypes.c_void_p),
        ("grad_query", ctypes.c_void_p),
        ("grad_key", ctypes.c_void_p),
        ("grad_value", ctypes.c_void_p),
        ("grad_gates", ctypes.c_void_p),
    )


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0"
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError) as error:
        logger.info("MoICE's kernels for the CPU are not used: %s", error)
        return str(error)
    problem = ctypes.POINTER(Problem)
    library.scratch_size.argtypes = [problem, ctypes.c_int64, ctypes.c_int]
    library.scratch_size.restype = ctypes.c_int64
    for function in (library.attend, library.decode):
        function.argtypes = [problem, ctypes.c_int64]
        function.restype = None
    return library


def _compiled() -> Path:
    """The path of the compiled library, which lasts as long as source, compiler and processor stay the same."""
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    if not compiler or not shutil.which(compiler[0]):
        raise RuntimeError("there is no C compiler (cc, gcc, clang, or the one that the variable CC names)")
    compiler = compiler if os.environ.get("CC") else compiler[:1]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    text = "\n".join([_SOURCE.read_text(), version, *_FLAGS, platform.machine(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_moice"
    target = folder / f"kernels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as build:
        made = Path(build) / target.name
        for optional in _OPTIONAL_FLAGS:
            command = [*compiler, *_FLAGS, *optional, str(_SOURCE), "-o", str(made), "-lm"]
            outcome = subprocess.run(command, capture_output=True, text=True)
            if outcome.returncode == 0:
                # Other processes may do the same at the same time.
                os.replace(made, target)
                logger.info("Compiled MoICE's kernels for the CPU: %s", shlex.join(command))
                return target
    raise RuntimeError(f"{shlex.join(command)} failed: {outcome.stderr.strip()[:500]}")


def _processor() -> str:
    """What tells processors apart that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
