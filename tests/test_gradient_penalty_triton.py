"""The Triton kernels of gradient_penalty and tangent_combine as GPUs get them: compiled ahead of time."""

import os
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl
from gpu_tools import compile_triton, triton_targets, triton_usage
from triton.backends.compiler import GPUTarget

from fastgan.kernels import gradient_penalty, tangent_combine
from fastgan.ops.gradient_penalty import KINDS

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
DTYPES = ("fp16", "bf16", "fp32", "fp64")


def usage_of(kernel, target: GPUTarget, dtype: str, **known):
    """Of a kernel on tensors of ``dtype``; numbers per sample are of the dtype that sums are of."""
    work = "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("grads", "t", "a"), f"*{dtype}")
    types |= dict.fromkeys(("factors", "out_norms", "out_factors", "out_penalty"), f"*{work}")
    types |= dict.fromkeys(("sums", "weight", "target", "power", "slope"), "fp64") | {"sums": "*fp64"}
    types |= dict.fromkeys(("out", "out_passed", "out_combined"), f"*{dtype}")
    constants = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "PIECE": 8192, "BLOCK": 1024}
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, 4), Path(folder))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["square_sums", "scale", "combine"])
def test_streams_without_spills(name, dtype, arch):
    kernel = getattr(tangent_combine if name == "combine" else gradient_penalty, name + "_kernel")
    usage = usage_of(kernel, TARGETS[arch], dtype, **({"out": "*fp64"} if name == "square_sums" else {}))
    assert usage.spills == 0
    assert usage.registers <= 80
    assert usage.shared <= 1024


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_finish_without_spills(kind, arch):
    constants = {"KIND": tl.constexpr(kind), "ONE_SIDED": kind == "gradient_penalty", "SAMPLES": gradient_penalty._SAMPLES}
    usage = usage_of(gradient_penalty.finish_kernel, TARGETS[arch], "fp32", **constants)
    assert usage.spills == 0
    assert usage.registers <= 128
