"""Legs of the battery: ``--backends reference,cpp`` (default), ``--backends triton`` under TRITON_INTERPRET=1, and on a GPU
``--device cuda``, by default ``--backends triton,cuda``.

A leg whose backend is missing fails: leaving one out is said on the command line, never silent.
"""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan import backends, bench

# pytest collects every logger's records, and torch's trace of what it compiles has thousands: 20 times slower tests
logging.getLogger("torch.__trace").propagate = False


# Whose tensors are where the library puts them; modules are made of tensors where a user's process would have moved them.
_PACKAGE = Path(fastgan.__file__).parent
_LIBRARY = (str(_PACKAGE), str(_PACKAGE.parent / "kernels"))
_MODULES = tuple(str(_PACKAGE / name) for name in ("nn", "recipes"))


class _OnGPU(bench._On):
    """What a test makes is made on the CPU, by its generators, and moved; what the library makes stays where it is made."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.compiler.is_compiling():  # what is traced has been made before
            return func(*args, **(kwargs or {}))
        file = sys._getframe(1).f_code.co_filename
        if file.startswith(_LIBRARY) and not file.startswith(_MODULES):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where tests make their tensors")
    parser.addoption("--backends", help="comma-separated backends that the operator battery runs on")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
        torch.backends.cudnn.allow_tf32 = False
        _OnGPU("cuda").__enter__()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="is about the CPU, or what it looks at can't be seen on a GPU"))


def _legs(config) -> list[str]:
    chosen = config.getoption("--backends")
    if not chosen and config.getoption("--device") == "cuda":
        chosen = "triton,cuda"
    elif not chosen:
        chosen = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference,cpp"
    return chosen.split(",")


def pytest_report_header(config):
    extension = backends.extension
    native = extension.path if extension.loaded else f"not used: {extension.problem}"
    return [f"fastgan {fastgan.__version__} from {fastgan.__file__}, torch {torch.__version__}", f"fastgan._C {native}"]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _legs(metafunc.config), indirect=True)


@pytest.fixture
def backend(request):
    """Serves the test from one backend and fails it unless that backend ran."""
    if request.param == "cuda":  # not every operator has kernels in CUDA C++
        op = request.node.callspec.params.get("op") or request.node.path.stem.removeprefix("test_")
        if op in backends.references and (problem := backends.problem("cuda", op, "cuda")) == backends.NO_KERNEL:
            pytest.skip(f"{op}: {problem}")
    before = backends.calls(request.param)
    with fastgan.use_backend(request.param):
        yield request.param
    assert backends.calls(request.param) > before, f"no kernel of backend {request.param!r} ran in this test"


@pytest.fixture
def poisoned():
    """Fresh torch memory holds NaN, so that reading what nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
