"""The tensors' side of the CUDA operators, csrc/cuda/<op>.cpp, with launches that compute on the CPU (cuda_launches.cpp).

What is built so takes the CUDA slots of a process of its own: this file, run as a program.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import LAYOUTS, OPERATORS, inputs, map_tensors, tensors_of
from torch.utils.cpp_extension import include_paths, library_paths

from fastgan.ops import references

pytestmark = pytest.mark.gpu_check

ROOT = Path(__file__).parent.parent
STEMS = ("gradient_penalty", "minibatch_discrimination", "minibatch_stddev", "tangent_combine", "spectral_norm")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def compare() -> int:
    """Every operator of STEMS in the CUDA slot against its reference; how many."""
    key, compared = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), 0
    for op in (op for op in OPERATORS if op.startswith(STEMS)):
        run = getattr(torch.ops.fastgan, op).default.redispatch
        cases = [
            (shape, dtype, LAYOUTS["contiguous"]) for shape in OPERATORS[op].shapes for dtype in (torch.float32, torch.float64)
        ]
        cases += [(shape, torch.float64, f) for shape in OPERATORS[op].interpreted for f in (*LAYOUTS.values(), channels_last)]
        for shape, dtype, layout in cases:
            values = map_tensors(layout, inputs(op, shape, dtype))
            for ours, expected in zip(tensors_of(run(key, *values)), tensors_of(references[op](*values)), strict=True):
                tolerance = 1e-10 if dtype == torch.float64 else 1e-4
                torch.testing.assert_close(
                    ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{op} {shape} {layout}: {{}}".format
                )
            compared += 1
    return compared


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("tensors") / "tensors.so"
    sources = [ROOT / "tests/cuda_launches.cpp", *(ROOT / f"csrc/cuda/{stem}.cpp" for stem in STEMS)]
    flags = [
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wl,-Bsymbolic",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    paths = [f"-I{ROOT / 'csrc'}", *(f"-I{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths())]
    subprocess.run(["c++", *flags, *sources, *paths, "-ltorch_cpu", "-lc10", "-o", path], check=True)
    return path


def test_the_tensors_side_of_cuda(library):
    run = subprocess.run([sys.executable, __file__, library], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    print(compare())
