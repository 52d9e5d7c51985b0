"""GPU kernels without a GPU: compile them ahead of time, read what they use, execute their PTX in an emulator.

``python tests/gpu_tools.py`` prints kernel x architecture -> registers, shared memory, spills, theoretical occupancy.
The emulator is not part of this project: ``FASTGAN_PTXEMU`` names the folder that contains the package ``ptxemu``.
"""

import ctypes
import importlib
import os
import re
import shutil
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
        return Usage(count("vgpr_count"), shared, count("vgpr_spill_count"))  # scalar ones go to vector registers
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    source, arch = folder / "kernel.ptx", re.search(r"\.target (sm_\w+)", ptx)[1]
    source.write_text(ptx)
    ptxas = get_ptxas(int(arch.rstrip("af")[3:])).path
    command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    return Usage(int(re.search(r"Used (\d+) registers", said)[1]), shared, spills)


def cuda_extension():
    """The built extension, where it has CUDA kernels; else the test is skipped."""
    if not extension.loaded or extension.record["cuda"] == "none":
        pytest.skip("fastgan._C is not built with CUDA (FASTGAN_BUILD=cuda python setup.py build_ext --inplace)")
    return extension


def _cuobjdump(*arguments: str) -> str:
    """NVIDIA's tool as Triton brings it, on the built extension."""
    path = cuda_extension().path
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="cuobjdump comes with triton, which is not installed")
    tool = Path(nvidia.__path__[0], "bin", "cuobjdump")
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    return subprocess.run([tool, *arguments, str(path)], check=True, capture_output=True, text=True).stdout


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


def cuda_ptx(kernel: str) -> str:
    """The PTX of the file in csrc/cuda that has a kernel of this (mangled) name in it."""
    modules = [text[text.index(".version") : text.rindex("}") + 1] for text in _cuobjdump("-ptx").split("Fatbin ptx code:")[1:]]
    (module,) = (module for module in modules if re.search(rf"\.entry \w*{kernel}", module))
    return module


def without_barrier(ptx: str, kernel: str, number: int) -> str:
    """PTX of the one kernel, with one of its barriers left out: what a test has to notice."""
    head = ptx[: re.search(r"^(\.visible |\.weak )?\.entry", ptx, re.MULTILINE).start()]
    (body,) = re.findall(rf"^(?:\.visible |\.weak )?\.entry \w*{kernel}.*?^}}", ptx, re.MULTILINE | re.DOTALL)
    barrier = list(re.finditer(r"bar(rier)?\.sync[^;]*;", body))[number]
    return head + body[: barrier.start()] + body[barrier.end() :]


def plain_cpp(folder: Path, source: str) -> ctypes.CDLL:
    """C++ that includes headers of csrc, compiled; its functions return int64_t."""
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler to cut launches' work with")
    path, library = folder / "launches.cpp", folder / "launches.so"
    path.write_text(source)
    csrc = Path(__file__).parent.parent / "csrc"
    subprocess.run(["c++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{csrc}", path, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in re.findall(r"^int64_t (\w+)\(", source, re.MULTILINE):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


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


class Memory:
    """Tensors as an emulated launch sees them: each storage a buffer with bounds of its own, at an address that kernels may
    be handed in a table, a struct or an argument. What ``outputs`` hold before the launch is nothing: to read it is an error.
    """

    def __init__(self, tensors, outputs=()):
        self.engine = importlib.import_module("ptxemu.engine")
        written = {x.untyped_storage().data_ptr() for x in outputs}
        self.buffers, self.places = [], {}
        arena = self.engine.Arena()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.places:
                memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                self.places[storage.data_ptr()] = arena.add("", memory)
                self.buffers.append((memory, storage.data_ptr() in written))

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        return self.places.get(storage.data_ptr(), 0) + tensor.data_ptr() - storage.data_ptr() if storage.nbytes() else 0

    def launch(self, program, *arguments, **options):
        """``program.launch`` with this memory in place before the arguments' own."""
        plain, buffers = self.engine.Arena, self.buffers

        class Arena(plain):
            def __init__(self):
                super().__init__()
                for number, (memory, _) in enumerate(buffers):
                    self.add(f"tensor {number}", memory)
                self.unwritten = [self.bufs[i][1:3] for i, (_, out) in enumerate(buffers) if out]

            @property
            def init_g(self):
                return self.initialised

            @init_g.setter
            def init_g(self, initialised):
                for start, end in self.unwritten:
                    initialised[start // self.granule : end // self.granule] = False
                self.initialised = initialised

        self.engine.Arena = Arena
        try:
            return program.launch(*arguments, on_uninit="raise", **options)
        finally:
            self.engine.Arena = plain


@dataclass
class Launch:
    kernel: str
    stats: object


@dataclass(frozen=True)
class Traffic:
    """What launches asked of memory, all in bytes but for the ratio."""

    distinct: int  # counted once per launch: what memory has to move at least
    sectors: int  # of 32 bytes, as asked of the L1 cache: what it moves at most
    conflicts: float  # passes over shared memory, to what they were without bank conflicts

    @classmethod
    def of(cls, launches) -> "Traffic":
        stats = [launch.stats for launch in launches]
        asked = sum(32 * kind[3] for s in stats for kind in s.glob.values())
        passes, ideal = (sum(kind[i] for s in stats for kind in s.shared.values()) for i in (4, 5))
        return cls(sum(s.unique_read + s.unique_written for s in stats), asked, passes / max(1, ideal))


TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}
_compiled: dict = {}


class Emulated:
    """Stands in for a Triton kernel: launches go to the PTX emulator, which raises for races, reads of memory that nothing
    wrote and addresses out of bounds. ``known``: tensors that tables may hold the addresses of."""

    def __init__(self, kernel, launches: list, known=(), target="sm_80"):
        self.kernel, self.launches, self.known, self.target = kernel, launches, known, target
        self.emulator = emulator()

    def compiled(self, types: dict, num_warps: int):
        key = self.kernel, repr(types), num_warps, self.target
        if key not in _compiled:
            compiled = compile_triton(self.kernel, types, triton_targets()[self.target], num_warps)
            _compiled[key] = compiled.metadata, self.emulator.load(compiled.asm["ptx"])
        return _compiled[key]

    def __getitem__(self, grid):
        def launch(*values, num_warps=4, **constants):
            import triton.language as tl

            names = self.kernel.arg_names
            kinds = {torch.Tensor: lambda x: f"*{TRITON_TYPES[x.dtype]}", int: lambda x: "i32", float: lambda x: "fp64"}
            constants = {k: tl.constexpr(v) if isinstance(v, str) else v for k, v in constants.items()}
            types = {name: kinds[type(value)](value) for name, value in zip(names, values, strict=False)} | constants
            metadata, program = self.compiled(types, num_warps)
            given = [(n, v) for n, v in zip(names, values, strict=False) if isinstance(v, torch.Tensor)]
            read = {v.untyped_storage().data_ptr() for n, v in given if not n.startswith("out")}
            outputs = [v for n, v in given if v.untyped_storage().data_ptr() not in read]
            values = list(values)
            if "addresses" in names:  # the table's are those of this process
                memory = Memory(self.known)
                at, known = names.index("addresses"), {x.data_ptr(): x for x in self.known}
                translated = [memory.address(known[x]) if x in known else 0 for x in values[at].tolist()]
                values[at] = torch.tensor(translated)
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            memory = Memory([*self.known, *tensors], outputs)
            arguments = [memory.address(value) if isinstance(value, torch.Tensor) else value for value in values]
            arguments += [None] * (len(program.kernels[metadata.name].params) - len(arguments))  # Triton's scratch memory
            stats = memory.launch(program, metadata.name, grid, num_warps * 32, arguments, metadata.shared)
            self.launches.append(Launch(self.kernel.__name__, stats))

        return launch


def broken(monkeypatch, module, function: str, old: str, new: str) -> None:
    """Put a copy of a module's jitted function in its place whose source has ``new`` for ``old``: what a test has to notice."""
    import linecache

    import triton

    source = getattr(module, function).src
    assert old in source
    name = f"<broken {module.__name__}.{function}>"
    text = "@triton.jit\n" + source.replace(old, new)
    linecache.cache[name] = len(text), None, text.splitlines(True), name  # where the compiler looks for sources
    namespace = module.__dict__ | {"triton": triton}
    exec(compile(text, name, "exec"), namespace)
    monkeypatch.setattr(module, function, namespace[function])
    for other in vars(module).values():
        if isinstance(other, triton.JITFunction):  # what calls it remembers a digest of both
            monkeypatch.setattr(other, "hash", None)
    monkeypatch.setattr(sys.modules[__name__], "_compiled", {})


def emulate(monkeypatch, module) -> list[Launch]:
    """All kernels of a module of ``fastgan.kernels`` go to the emulator; the list fills with their launches.

    Arguments that a kernel only writes to are those whose names begin with "out".
    """
    launches, known = [], []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Emulated(getattr(module, name), launches, known))
    if hasattr(module, "addresses"):
        original = module.addresses

        def addresses(columns, device):
            known[:] = [x for column in columns for x in column]
            return original(columns, device)

        monkeypatch.setattr(module, "addresses", addresses)
    return launches


def _print_table() -> None:
    names = ("minibatch_discrimination", "minibatch_stddev", "gradient_penalty", "spectral_norm", "pairwise_kernel_sum")
    rows = []
    try:
        for name in names:
            rows += importlib.import_module(f"test_{name}_triton").resource_rows()
    except pytest.skip.Exception as missing:
        print(f"Triton: {missing}", file=sys.stderr)
    try:
        for (kernel, arch), usage in cuda_usage().items():
            ops = "spectral_norm", "minibatch_discrimination", "minibatch_stddev"
            op = next((op for op in ops if op in kernel), "streams")
            home = importlib.import_module(f"test_{op}_cuda")
            warps = home.warps_of(kernel) if hasattr(home, "warps_of") else home.WARPS
            rows.append((home.describe(kernel), f"sm_{arch}", usage, usage.occupancy(arch, warps)))
    except pytest.skip.Exception as missing:
        print(f"CUDA C++: {missing}", file=sys.stderr)
    print("| kernel | arch | registers | shared bytes | spills | occupancy |\n| --- | --- | --- | --- | --- | --- |")
    for kernel, arch, usage, occupancy in rows:
        share = "" if occupancy is None else f"{occupancy:.0%}"
        print(f"| {kernel} | {arch} | {usage.registers} | {usage.shared} | {usage.spills} | {share} |")


if __name__ == "__main__":
    _print_table()
