"""The Triton kernels compile for GPUs that are not at hand, and fit their registers and shared memory."""

import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from test_triton import INTERPRETED, problem
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_moice.attention.triton import autograd, backward, decoding, prefill
from peft_moice.attention.triton import problem as problem_module
from peft_moice.rope import RotaryLayout

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="needs Triton without its interpreter")]

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
KERNELS = {
    "forward_kernel": prefill,
    "query_kernel": backward,
    "key_kernel": backward,
    "decode_kernel": decoding,
    "combine_kernel": decoding,
}


class Launches:
    """Stands in for a kernel, and keeps the arguments of its last launch instead of running it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.arguments = None

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}

        return launch

    def compile(self, target: int):
        """The kernel as it would be compiled for this launch."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments.pop(parameter.name)
            aligned = isinstance(value, torch.Tensor)
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif aligned:
                signature[parameter.name] = POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=self.arguments)


@pytest.mark.parametrize(("target", "shared_memory"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_kernels_compile_and_fit(target, shared_memory, monkeypatch, tmp_path):
    """In bfloat16, heads of 128 dimensions. Registers spilled to the stack stay below 128 bytes a thread."""
    launches = {name: Launches(getattr(module, name)) for name, module in KERNELS.items()}
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, launches[name])
    monkeypatch.setattr(problem_module, "capability", lambda device: target // 10)
    for queries in (1, 256):
        tensors, options = problem(
            queries,
            256,
            (8, 2),
            experts=7,
            layout=RotaryLayout(0, 128, False),
            sizes=(128, 128),
            dtype=torch.bfloat16,
        )
        tensors = [tensor.requires_grad_(queries > 1) for tensor in tensors]
        arguments = (*tensors, None, None, options["rotations"], options["query_start"], 0.1)
        output = autograd.run(*arguments)
        if queries > 1:
            output.sum().backward()
    for name, launch in launches.items():
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= shared_memory, name
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])
        assert stack < 128, name
