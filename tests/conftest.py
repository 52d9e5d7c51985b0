"""Legs of the battery: ``--backends reference,cpp`` (default) and, under TRITON_INTERPRET=1, ``--backends triton``.

A leg whose backend is missing fails: leaving one out is said on the command line, never silent.
"""

import logging
import os

import pytest
import torch

import fastgan
from fastgan import backends

# pytest collects every logger's records, and torch's trace of what it compiles has thousands: 20 times slower tests
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser):
    default = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference,cpp"
    parser.addoption("--backends", default=default, help="comma-separated backends that the operator battery runs on")


def pytest_report_header(config):
    extension = backends.extension
    native = extension.path if extension.loaded else f"not used: {extension.problem}"
    return [f"fastgan {fastgan.__version__} from {fastgan.__file__}, torch {torch.__version__}", f"fastgan._C {native}"]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backends").split(","), indirect=True)


@pytest.fixture
def backend(request):
    """Serves the test from one backend and fails it unless that backend ran."""
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
