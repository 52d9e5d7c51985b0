"""The Triton kernels of minibatch_stddev as GPUs get them: compiled ahead of time."""

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

from fastgan.kernels import minibatch_stddev

pytestmark = pytest.mark.gpu_check

TARGETS = triton_targets()
DTYPES = ("fp16", "bf16", "fp32", "fp64")

#: operator -> what its launch of the kernel of columns is specialised for
OPERATORS = {
    "forward": {"TANGENT": False, "WEIGHTS": False, "VALUES": True},
    "backward": {"TANGENT": False, "WEIGHTS": True, "VALUES": False},
    "jvp": {"TANGENT": True, "WEIGHTS": False, "VALUES": True},
    "double_backward": {"TANGENT": True, "WEIGHTS": True, "VALUES": True},
}


def usage_of(kernel, target: GPUTarget, dtype: str, **known):
    types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp64", "parts": "*fp64", "reached": "*fp64"}
    types |= dict.fromkeys(("x", "v", "grad", "values", "gradient", "out"), f"*{dtype}")
    constants = {"STRIDED": True, "UNBIASED": False, "ACC": tl.float64 if dtype == "fp64" else tl.float32}
    constants["BLOCK"] = minibatch_stddev._BLOCK
    arguments = {arg: value for arg, value in (types | constants | known).items() if arg in kernel.arg_names}
    with tempfile.TemporaryDirectory() as folder:
        return triton_usage(compile_triton(kernel, arguments, target, 4), Path(folder))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPERATORS)
def test_columns_without_spills(op, dtype, arch):
    usage = usage_of(minibatch_stddev.column_kernel, TARGETS[arch], dtype, **OPERATORS[op])
    assert usage.spills == 0
    assert usage.registers <= 80
    assert usage.shared <= 1024


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reached", "append"])
def test_appended_channels_without_spills(name, dtype, arch):
    kernel = getattr(minibatch_stddev, name + "_kernel")
    usage = usage_of(kernel, TARGETS[arch], dtype, **({"out": "*fp64"} if name == "reached" else {}))
    assert usage.spills == 0
    assert usage.registers <= 80
    assert usage.shared <= 1024
