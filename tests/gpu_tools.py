"""GPU kernels without a GPU: compile them ahead of time, read what they use, execute their PTX in an emulator.

``python tests/gpu_tools.py`` prints kernel x architecture -> registers, shared memory, spills, theoretical occupancy.
The emulator is not part of this project: ``FASTGAN_PTXEMU`` names the folder that contains the package ``ptxemu``.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.backends import extension

#: compute capability -> (warps, bytes of shared memory) of a multiprocessor; it has 65536 registers and 32 blocks
MULTIPROCESSOR = {80: (64, 164 << 10), 86: (48, 100 << 10), 89: (48, 100 << 10), 90: (64, 228 << 10), 100: (64, 228 << 10)}


@dataclass(frozen=True)
class Usage:
    registers: int
    shared: int
    spills: int  # bytes of local memory on NVIDIA, registers on AMD

    def occupancy(self, arch: int, warps: int) -> float:
        """Share of a multiprocessor's warps that can be resident."""
        most_warps, memory = MULTIPROCESSOR[arch]
        registers = -(-self.registers * 32 // 256) * 256 * warps
        blocks = min(most_warps // warps, 65536 // registers, memory // (self.shared + 1024), 32)
        return blocks * warps / most_warps


def triton_targets() -> dict:
    """Architectures that Triton kernels are compiled for, by name."""
    from triton.backends.compiler import GPUTarget

    return {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}


def compile_triton(kernel, arguments: dict, target, num_warps: int):
    """``arguments``: parameter -> Triton type ("*fp32", "i32") or, for a constant, its value."""
    from triton import compile
    from triton.compiler import ASTSource

    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    return compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": num_warps})


def triton_usage(compiled, folder: Path) -> Usage:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        count = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])[1])  # noqa: E731
        return Usage(count("vgpr_count"), shared, count("vgpr_spill_count") + count("sgpr_spill_count"))
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    source, arch = folder / "kernel.ptx", re.search(r"\.target (sm_\w+)", ptx)[1]
    source.write_text(ptx)
    ptxas = get_ptxas(int(arch.rstrip("af")[3:])).path
    command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    return Usage(int(re.search(r"Used (\d+) registers", said)[1]), shared, spills)


def _cuobjdump(*arguments: str) -> str:
    """NVIDIA's tool as Triton brings it, on the built extension."""
    if not extension.loaded or extension.record["cuda"] == "none":
        pytest.skip("fastgan._C is not built with CUDA (FASTGAN_BUILD=cuda python setup.py build_ext --inplace)")
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="cuobjdump comes with triton, which is not installed")
    tool = Path(nvidia.__path__[0], "bin", "cuobjdump")
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    return subprocess.run([tool, *arguments, str(extension.path)], check=True, capture_output=True, text=True).stdout


def cuda_usage() -> dict[tuple[str, int], Usage]:
    """(mangled kernel, arch) -> what it uses, of every kernel in the built extension."""
    usages, arch = {}, 0
    pattern = r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for found, kernel, registers, stack, shared, local in re.findall(pattern, _cuobjdump("-res-usage")):
        if found:
            arch = int(found)
        else:
            usages[kernel, arch] = Usage(int(registers), int(shared), int(stack) + int(local))
    return usages


def cuda_ptx() -> str:
    text = _cuobjdump("-ptx")
    return text[text.index(".version") : text.rindex("}") + 1]


def emulator():
    folder = os.environ.get("FASTGAN_PTXEMU")
    if not folder:
        pytest.skip("no PTX emulator (FASTGAN_PTXEMU=<folder that contains ptxemu>)")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("ptxemu")


def array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, with bfloat16 as 16-bit integers: numpy has none."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


class Emulated:
    """Stands in for a Triton kernel: launches go to the emulator. What it writes to are the arguments named out..."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        def launch(*values, num_warps, **constants):
            types = [f"*{_TRITON_NAMES[v.dtype]}" if isinstance(v, torch.Tensor) else "i32" for v in values]
            parameters = dict(zip(self.kernel.arg_names, types, strict=False)) | constants
            compiled = compile_triton(self.kernel, parameters, triton_targets()["sm_80"], num_warps)
            buffers = []
            for name, value in zip(self.kernel.arg_names, values, strict=False):
                memory = array(value) if isinstance(value, torch.Tensor) else value
                buffers.append(ptxemu.Buf(memory, out=True) if name.startswith("out") else memory)
            metadata, program = compiled.metadata, ptxemu.load(compiled.asm["ptx"])
            buffers += [None] * (len(program.kernels[metadata.name].params) - len(buffers))  # Triton's scratch memory
            program.launch(metadata.name, grid, num_warps * 32, buffers, metadata.shared, on_uninit="raise")
            self.launches += 1

        ptxemu = emulator()
        return launch


def _print_table() -> None:
    from test_minibatch_discrimination_cuda import WARPS, describe
    from test_minibatch_discrimination_triton import resource_rows

    print("| kernel | arch | registers | shared bytes | spills | occupancy |\n| --- | --- | --- | --- | --- | --- |")
    rows = list(resource_rows())
    try:
        for (kernel, arch), usage in cuda_usage().items():
            rows.append((describe(kernel), f"sm_{arch}", usage, usage.occupancy(arch, WARPS)))
    except pytest.skip.Exception as missing:
        print(f"CUDA C++: {missing}", file=sys.stderr)
    for kernel, arch, usage, occupancy in rows:
        share = "" if occupancy is None else f"{occupancy:.0%}"
        print(f"| {kernel} | {arch} | {usage.registers} | {usage.shared} | {usage.spills} | {share} |")


if __name__ == "__main__":
    _print_table()
