"""The Triton kernels compile for GPUs that are not at hand, and fit their registers and shared memory."""

import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from test_triton import INTERPRETED, causal, problem
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from peft_moice.attention.call import AttentionCall
from peft_moice.attention.triton import autograd, backward, decoding, prefill
from peft_moice.attention.triton import problem as problem_module
from peft_moice.rope import RotaryLayout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton without its interpreter")

KERNELS = {
    "forward_kernel": prefill,
    "query_kernel": backward,
    "key_kernel": backward,
    "decode_kernel": decoding,
    "combine_kernel": decoding,
}


class Device:
    """The answers of a driver that Triton needs in order to compile."""

    def __init__(self, target: int):
        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launches:
    """Stands in for a kernel: compiles it for each launch, and does not run it."""

    def __init__(self, kernel, compiled: list):
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append((self.kernel.__name__, self.kernel.warmup(*args, grid=grid, **kwargs)))

        return launch


@pytest.fixture
def compile_for(monkeypatch):
    """Maps a target and the arguments of [`problem`] to the names and kernels that its calls compile."""
    kernels = {name: getattr(module, name) for name, module in KERNELS.items()}

    def compiled(target: int, options: dict | None = None, gradients: bool = True, **shape) -> list:
        monkeypatch.setattr(driver, "_active", Device(target))
        monkeypatch.setattr(problem_module, "capability", lambda device: target // 10)
        found = []
        for name, module in KERNELS.items():
            monkeypatch.setattr(module, name, Launches(kernels[name], found))
        tensors, defaults = problem(**shape)
        defaults |= options or {}
        tensors = [tensor.requires_grad_(gradients) for tensor in tensors]
        output = autograd.attend(AttentionCall(*tensors, **defaults))
        if gradients:
            output.sum().backward()
        return found

    return compiled


HEADS = {"layout": RotaryLayout(0, 128, False), "sizes": (128, 128), "dtype": torch.bfloat16, "heads": (8, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "shared_memory"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_kernels_fit(target, shared_memory, compile_for, tmp_path):
    """In bfloat16, heads of 128 dimensions. Registers spilled to the stack stay below 128 bytes a thread."""
    compiled = compile_for(target, queries=1, keys=64, experts=7, gradients=False, **HEADS)
    compiled += compile_for(target, queries=64, experts=2, **HEADS)
    assert {name for name, _ in compiled} == set(KERNELS)
    for name, kernel in compiled:
        assert kernel.metadata.shared <= shared_memory, name
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])
        assert stack < 128, name


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 20])
def test_other_branches_compile(queries, compile_for):
    """Masks, a start on the device, interleaved pairs, unrotated dimensions, heads of 80 dimensions."""
    mask = causal(queries, 40, 4).cpu()
    if queries == 1:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1.0)
    options = {"attention_mask": mask, "query_start": torch.tensor(4)}
    shape = {"keys": 40, "experts": 2, "layout": RotaryLayout(0, 32, True), "sizes": (80, 80), "dtype": torch.float16}
    compiled = compile_for(90, options, gradients=queries > 1, queries=queries, **shape)
    assert len({name for name, _ in compiled}) == (2 if queries == 1 else 3)
