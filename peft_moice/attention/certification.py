"""Whether an implementation is right and fast on the user's device, found out there and remembered on disk.

The kernels for CUDA were written without a GPU at hand. Before "auto" takes them, they are compared with `reference`
on small random problems, in outputs and gradients, and timed beside the model's own attention at the size of the call.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..rope import RotaryLayout, RotationTable
from . import reference
from .cache_folder import cache_folder
from .call import AttentionCall, Implementation

logger = logging.getLogger(__name__)

_REPETITIONS = 3
_MOST_SECONDS = 900
_MOST_ERROR = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference to `reference` that is taken for rounding, as a share of the largest value."""


@dataclass(frozen=True)
class Problem:
    """A random problem on which an implementation is compared with `reference`."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    top_k: int
    mask: str | None


_PROBLEMS = (
    Problem(1, 2, 2, 40, 40, 4, None),
    Problem(2, 6, 2, 33, 70, 2, None),
    Problem(2, 4, 1, 20, 50, 1, "boolean"),
    Problem(1, 4, 4, 17, 17, 2, "additive"),
    Problem(2, 6, 2, 1, 90, 2, None),
)
_ROPE_BASES = (1e4, 2.5e3, 4e4, 1.6e5)


@dataclass(frozen=True)
class Verdict:
    """What was found out about an implementation on a device.

    Attributes:
        name: the implementation's.
        device: name of the device.
        dtype: of queries, keys and values.
        head_dim: D.
        layout: how rotated coordinates pair up.
        fault: why it must not be used, or None if its outputs and gradients are right.
    """

    name: str
    device: str
    dtype: torch.dtype
    head_dim: int
    layout: RotaryLayout
    fault: str | None


def certify(
    device: torch.device | str = "cuda",
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
    head_dims: Sequence[int] = (64, 128),
    names: Sequence[str] = ("triton",),
) -> list[Verdict]:
    """Compare implementations with `reference` on `device`, in outputs and gradients; nothing is remembered.

    `python -m peft_moice.attention.certification` prints the table.

    Args:
        device: where. Default: "cuda".
        dtypes: of queries, keys and values. Default: bfloat16, float16, float32.
        head_dims: head sizes D. Default: 64 and 128.
        names: of implementations. Default: "triton".

    Returns:
        A verdict for each implementation, dtype, head size and layout (half, interleaved).

    Raises:
        ValueError: `device` is a GPU, and PyTorch finds none.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"PyTorch finds no GPU for the device {str(device)!r}. Name another, such as 'cpu'.")
    return [
        Verdict(name, device_name(device), dtype, size, layout, find_fault(load(name), device, dtype, layout, size))
        for name in names
        for dtype in dtypes
        for size in head_dims
        for layout in (RotaryLayout(0, size, False), RotaryLayout(0, size, True))
    ]


def load(name: str) -> Implementation:
    """The module of the implementation called `name`."""
    module: Implementation = importlib.import_module(f".{name}", __package__)
    return module


def find_fault(
    candidate: Implementation, device: torch.device, dtype: torch.dtype, layout: RotaryLayout, head_dim: int
) -> str | None:
    """Why `candidate` is not right for these, or None if its outputs and gradients are those of `reference`."""
    for problem in _PROBLEMS:
        try:
            fault = _compare(candidate, problem, device, dtype, layout, head_dim)
        except Exception as error:
            # A compiler or driver that fails does so with errors of its own.
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        if fault is not None:
            return f"{fault}, on {problem}"
    return None


def _compare(
    candidate: Implementation,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    layout: RotaryLayout,
    head_dim: int,
) -> str | None:
    call = _random_call(problem, device, dtype, layout, head_dim)
    reason = candidate.why_not(call)
    if reason is not None:
        return f"it refuses the problem: {reason}"
    names = ("output", "query", "key", "value", "gates")
    weight = torch.randn(call.query.transpose(1, 2).shape, generator=torch.Generator().manual_seed(1))
    actual, expected = (_with_gradients(one, call, weight.to(device)) for one in (candidate, reference))
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        error, largest = (ours.float() - theirs.float()).abs().max().item(), theirs.float().abs().max().item()
        if not error <= _MOST_ERROR[dtype] * max(largest, 1e-3):
            what = "the output" if name == "output" else f"the gradient of {name}"
            return f"{what} is off by {error:.1e} of {largest:.1e}"
    return None


def _random_call(
    problem: Problem, device: torch.device, dtype: torch.dtype, layout: RotaryLayout, head_dim: int
) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    num_experts = len(_ROPE_BASES)
    query, key, value = (
        torch.randn(problem.batch, heads, length, head_dim, generator=generator).to(device, dtype)
        for heads, length in (
            (problem.heads, problem.queries),
            (problem.kv_heads, problem.keys),
            (problem.kv_heads, problem.keys),
        )
    )
    probs = torch.rand(problem.batch, problem.heads, problem.queries, num_experts, generator=generator) + 0.1
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(problem.top_k).indices, 1.0)
    gates = probs * kept / (probs * kept).sum(dim=-1, keepdim=True)
    pairs = torch.arange(0, layout.size, 2, dtype=torch.float64) / layout.size
    frequencies = torch.stack([base**-pairs for base in _ROPE_BASES])
    start, mask = problem.keys - problem.queries, None
    if problem.mask is not None:
        visible = torch.arange(problem.keys) <= start + torch.arange(problem.queries)[:, None]
        visible = visible & (torch.arange(problem.keys) % 7 != 3) | (torch.arange(problem.keys) == 0)
        visible = visible.expand(problem.batch, 1, -1, -1).to(device)
        low = torch.finfo(dtype).min
        mask = (
            visible if problem.mask == "boolean" else torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, low)
        )
    rotations = RotationTable(frequencies - frequencies[0], layout)
    return AttentionCall(query, key, value, gates.to(device), rotations, start, attention_mask=mask)


def _with_gradients(implementation: Implementation, call: AttentionCall, weight: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of query, key, value and gates of its sum weighted by `weight`."""
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value, call.gates)]
    query, key, value, gates = leaves
    with torch.enable_grad():
        output, _ = implementation.run(dataclasses.replace(call, query=query, key=key, value=value, gates=gates))
        total = (output.float() * weight).sum()
    *grads, grad_gates = torch.autograd.grad(total, leaves)
    # Gates of experts that a row did not pick may have a gradient or not.
    return [output.detach(), *grads, grad_gates * call.picks()]


def milliseconds(implementation: Implementation, call: AttentionCall) -> float:
    """Median time of `call`, without its gradients; infinity if it fails or runs out of memory."""
    times = []
    device = call.query.device
    try:
        # Neither the random numbers nor the graph of the pass that asks may be touched.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(_REPETITIONS + 1):
                _synchronize(device)
                start = time.perf_counter()
                implementation.run(call)
                _synchronize(device)
                times.append(1000 * (time.perf_counter() - start))
    except RuntimeError as error:
        logger.info("%s cannot be timed: %s", implementation, error)
        return math.inf
    return statistics.median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_fault_apart(
    name: str, device: torch.device, dtype: torch.dtype, layout: RotaryLayout, head_dim: int
) -> str | None:
    """[`find_fault`] in a process of its own, since a kernel that reads astray spoils the device for its process."""
    asked = {"name": name, "device": str(device), "dtype": str(dtype), "layout": dataclasses.asdict(layout)}
    command = [sys.executable, "-m", __name__, json.dumps({**asked, "head_dim": head_dim})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_MOST_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it could not be tried ({type(error).__name__}: {str(error)[:300]})"
    try:
        fault: str | None = json.loads(done.stdout.splitlines()[-1])["fault"]
    except (IndexError, ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        return f"the process that tried it ended with status {done.returncode}: {last}"
    return fault


def _answer(asked: dict[str, Any]) -> None:
    """The other end of [`find_fault_apart`]."""
    dtype, layout = getattr(torch, asked["dtype"].removeprefix("torch.")), RotaryLayout(**asked["layout"])
    fault = find_fault(load(asked["name"]), torch.device(asked["device"]), dtype, layout, asked["head_dim"])
    sys.stdout.write(json.dumps({"fault": fault}) + "\n")


@dataclass
class Certificates:
    """Verdicts and times on this machine, remembered in a file.

    Args:
        path: the JSON file. Default: `certificates.json` in the user's cache folder (`XDG_CACHE_HOME`).
        find: what finds a fault. Default: [`find_fault_apart`].
    """

    path: Path | None = None
    find: Callable[[str, torch.device, torch.dtype, RotaryLayout, int], str | None] = find_fault_apart
    _known: dict[str, Any] | None = None
    # The same by what is cheap to compare, as each layer asks in every pass.
    _answers: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)

    def fault(self, name: str, call: AttentionCall) -> str | None:
        """Why the implementation called `name` must not compute calls like this one; found out once per machine."""
        query, layout = call.query, call.rotations.layout
        question = (name, query.device, query.dtype, query.shape[-1], layout)
        if question not in self._answers:
            self._answers[question] = self._find_fault(name, call)
        known: str | None = self._answers[question]
        return known

    def _find_fault(self, name: str, call: AttentionCall) -> str | None:
        query, layout = call.query, call.rotations.layout
        key = _key(query.device, name, query.dtype, query.shape[-1], layout)
        if key not in self._entries():
            logger.warning(
                "MoICE compares its implementation %r with its reference on %s, which takes a minute or two, once.",
                name,
                device_name(query.device),
            )
            fault = self.find(name, query.device, query.dtype, layout, query.shape[-1])
            self._remember(key, fault)
            if fault is not None:
                logger.warning(
                    "MoICE does not use its implementation %r on %s: %s. Please report this line at the project's "
                    "issues; everything else keeps working, without the speed of that implementation.",
                    name,
                    device_name(query.device),
                    fault,
                )
        known: str | None = self._entries()[key]
        return known

    def fastest(self, candidates: Mapping[str, Implementation], call: AttentionCall) -> str:
        """The name of the fastest of `candidates`, timed once per machine and size of the call."""
        if len(candidates) == 1:
            return next(iter(candidates))
        query, num_keys = call.query, call.key.shape[2]
        sizes = (query.shape[0], query.shape[1], call.key.shape[1], query.shape[-1], call.num_experts)
        lengths = ((query.shape[2] - 1).bit_length(), (num_keys - 1).bit_length())
        parts = (*candidates, query.dtype, *sizes, *lengths, call.top_k, call.backend)
        question = (query.device, *parts)
        if question not in self._answers:
            self._answers[question] = self._find_fastest(candidates, call, _key(query.device, *parts))
        return str(self._answers[question])

    def _find_fastest(self, candidates: Mapping[str, Implementation], call: AttentionCall, key: str) -> str:
        if key not in self._entries():
            times = {name: milliseconds(candidate, call) for name, candidate in candidates.items()}
            best = min(times, key=lambda name: times[name])
            self._remember(key, best)
            logger.info(
                "MoICE takes the implementation %r for queries like %s and keys like %s: %s.",
                best,
                tuple(call.query.shape),
                tuple(call.key.shape),
                ", ".join(f"{name} {value:.2f} ms" for name, value in times.items()),
            )
        return str(self._entries()[key])

    def _file(self) -> Path:
        return cache_folder() / "certificates.json" if self.path is None else self.path

    def _entries(self) -> dict[str, Any]:
        if self._known is None:
            try:
                known = json.loads(self._file().read_text())
                self._known = known if isinstance(known, dict) else {}
            except (OSError, RuntimeError, ValueError):
                self._known = {}
        return self._known

    def _remember(self, key: str, value: str | None) -> None:
        entries = self._entries()
        entries[key] = value
        try:
            target = self._file()
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
                json.dump(entries, file, indent=1)
            os.replace(file.name, target)
        except (OSError, RuntimeError) as error:
            logger.info("MoICE's certificates cannot be written: %s", error)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


@functools.cache
def _versions() -> str:
    """What a verdict depends on beside the device: versions of PyTorch, Triton, this package and the driver."""
    found = []
    for package in ("peft_moice", "torch", "triton"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    driver = torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else None  # type: ignore[attr-defined]
    return ", ".join([*found, f"CUDA {torch.version.cuda}", f"driver {driver}"])


def _key(device: torch.device, *parts: object) -> str:
    return " | ".join([_versions(), device_name(device), *map(str, parts)])


CERTIFICATES = Certificates()
"""Those of this machine, by which "auto" chooses on a GPU."""

if __name__ == "__main__":
    if len(sys.argv) > 1:
        _answer(json.loads(sys.argv[1]))
    else:
        for verdict in certify():
            state = "right" if verdict.fault is None else verdict.fault
            print(verdict.name, verdict.device, verdict.dtype, verdict.head_dim, verdict.layout, state, sep=" | ")
