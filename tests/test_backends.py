"""Choosing backends, refusing where one can't serve, recognising a wrong binary, and telling the user."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan import backends, doctor

PACKAGE = Path(fastgan.__file__).parent
OP = "minibatch_discrimination"


def python(code: str, *, cwd=None, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter whose fastgan is the one under test, unless PYTHONPATH says otherwise."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGAN_", "TRITON_"))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=clean | environment)


def run_op():
    return torch.ops.fastgan.minibatch_discrimination(torch.zeros(3, 2, 1), True)


def test_unknown_name():
    with pytest.raises(ValueError, match="name is 'cuad', expected one of 'reference', 'cpp', 'triton', 'cuda'"):
        fastgan.use_backend("cuad")


def test_nested_choices_unwind():
    def ran(name):
        before = backends.calls(name)
        run_op()
        return backends.calls(name) > before

    default = backends.serving(OP, "cpu")
    with fastgan.use_backend("reference"):
        assert ran("reference")
        if backends.extension.loaded:
            with fastgan.use_backend("cpp"):
                assert ran("cpp")
                assert not ran("reference")
        assert ran("reference")
    assert backends.serving(OP, "cpu") == default
    assert ran(default)


def test_a_raising_block_unwinds_too():
    default = backends.serving(OP, "cpu")
    with pytest.raises(KeyError), fastgan.use_backend("reference"):
        raise KeyError
    assert backends.serving(OP, "cpu") == default


def test_autograd_and_compiled_graphs_follow_the_choice():
    m = torch.randn(4, 2, 3, requires_grad=True)
    compiled = torch.compile(lambda x: fastgan.minibatch_discrimination(x).sum(), fullgraph=True, backend="aot_eager")
    compiled(m).backward()
    before = backends.calls("reference")
    with fastgan.use_backend("reference"):
        compiled(m).backward()
    assert backends.calls("reference") == before + 2  # forward and backward


def test_no_warning_at_import_or_choice():
    result = python(
        "import warnings; warnings.simplefilter('error'); import fastgan\nwith fastgan.use_backend('reference'): pass"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_environment_variable_names_a_backend():
    code = "import fastgan; print(fastgan.backends.serving('minibatch_discrimination', 'cpu'))"
    assert python(code, FASTGAN_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, FASTGAN_BACKEND="nonesuch")
    assert wrong.returncode != 0
    assert "expected one of" in wrong.stderr


def test_triton_on_cpu_says_how():
    result = python(
        "import torch, fastgan\nwith fastgan.use_backend('triton'): fastgan.minibatch_discrimination(torch.zeros(2, 2, 2))"
    )
    assert "TRITON_INTERPRET=1" in result.stderr
    assert "can't serve cpu tensors" in result.stderr


@pytest.mark.parametrize("module", sorted(path.stem for path in (PACKAGE.parent / "kernels").glob("*.py")))
def test_triton_makes_launchers(module):
    """On a GPU Triton writes a Python function for each kernel, with names of its own beside the kernel's parameters."""
    jit = pytest.importorskip("triton.runtime.jit")
    for name, kernel in vars(importlib.import_module(f"fastgan.kernels.{module}")).items():
        if name.endswith("_kernel") and hasattr(kernel, "params"):
            jit.create_function_from_signature(kernel.signature, kernel.params, None)
            assert not {"params", "specialization", "backend"} & set(kernel.signature.parameters), name


@pytest.mark.parametrize(
    "archs, gpus, expected",
    [
        ("80+86+90", [(8, 0)], True),
        ("80+86+90", [(8, 9), (9, 0)], True),
        ("80+86+90", [(7, 5), (9, 0)], False),  # machine code of none
        ("86+90", [(8, 0)], False),
        ("80+90", [(12, 0)], True),  # by PTX of the last
        ("80+100", [(9, 0)], False),
        ("none", [(9, 0)], False),
        ("80", [], False),
    ],
)
def test_which_gpus_a_binary_runs_on(archs, gpus, expected):
    assert backends.runs_on(archs, gpus) is expected


class Driver:
    """NVML of two Hopper GPUs, as ctypes would call it."""

    nvmlInit_v2 = nvmlShutdown = nvmlDeviceGetHandleByIndex_v2 = staticmethod(lambda *_: 0)
    failure = 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = 9, 0
        return self.failure


def test_gpus_are_asked_of_the_driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda name: driver)
    assert backends._capabilities() == [(9, 0)] * 2
    driver.failure = 3
    assert backends._capabilities() == []
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda name: object())  # an older driver's
    assert backends._capabilities() == []


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize(("fits", "served"), [(True, "cuda"), (False, "triton"), (None, "triton")])
def test_native_kernels_serve_the_gpus_they_are_built_for(monkeypatch, fits, served, triton):
    """Elsewhere Triton, and without it plain torch; where no GPU was found, they would be tried."""
    if (OP, "CUDA") not in backends.extension.slots:
        pytest.skip("fastgan._C is not built with CUDA")
    monkeypatch.setattr(backends.extension, "gpus", fits)
    monkeypatch.setattr(backends, "_triton_problem", lambda op: None if triton else "not installed")
    if not triton:
        served = "reference" if fits is False else "cuda"
    assert backends.serving(OP, "cuda") == served
    assert ((OP, "CUDA") in backends._slots_for(None)) == (served != "cuda")
    problem = backends.problem("cuda", OP, "cuda")
    assert problem is None or (fits is False and "was built for sm_" in problem)


# Without what is optional


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastgan; print(fastgan.minibatch_discrimination(torch.zeros(2, 2, 2)).sum().item())\n"
        "print(fastgan.backends.problem('triton', 'minibatch_discrimination', 'cuda'))"
    )
    result = python(code)
    assert result.stdout.splitlines() == ["8.0", "triton is not installed (pip install 'fastgan[triton]')"], result.stderr


def test_import_takes_torch_alone(tmp_path):
    """No numpy, triton, rich, ... even if they are there; no compiler and no just-in-time build."""
    code = (
        "import sys, builtins; real = builtins.__import__\n"
        "import torch; before = set(sys.modules)\n"
        "import fastgan\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    result = python(code, PATH=str(tmp_path))
    assert result.stdout.strip() == "['fastgan']", result.stdout + result.stderr


@pytest.fixture
def copy_of_package(tmp_path):
    """An importable copy in which a test may break things."""
    shutil.copytree(PACKAGE, tmp_path / "fastgan", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


PROBE = """
import torch, fastgan
m = torch.randn(4, 2, 3, requires_grad=True)
fastgan.minibatch_discrimination(m).sum().backward()
extension = fastgan.backends.extension
print(fastgan.__file__, fastgan.backends.serving('minibatch_discrimination', 'cpu'), extension.problem, sep='|')
"""


def probe(folder: Path) -> tuple[str, str, str]:
    """(serving, problem, standard error) of the copy; proves that the copy is what was imported."""
    result = python(PROBE, cwd=folder, PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stderr
    file, serving, problem = result.stdout.strip().split("|")
    assert Path(file) == folder / "fastgan" / "__init__.py"
    return serving, problem, result.stderr


def binary(folder: Path) -> Path:
    (path,) = (folder / "fastgan").glob("_C*.so")
    return path


def test_without_the_binary(copy_of_package):
    binary(copy_of_package).unlink()
    serving, problem, stderr = probe(copy_of_package)
    assert serving == "reference"
    assert "fastgan._C is not built" in problem
    assert stderr == ""


def test_the_copy_itself_is_sound(copy_of_package):
    assert probe(copy_of_package) == ("cpp", "None", "")


def test_binary_of_another_version_is_never_loaded(copy_of_package):
    path = binary(copy_of_package)
    path.write_bytes(path.read_bytes().replace(b"version=" + fastgan.__version__.encode(), b"version=0.0.0"))
    serving, problem, stderr = probe(copy_of_package)
    assert serving == "reference"
    assert f"built for fastgan 0.0.0, this is {fastgan.__version__}" in problem
    assert stderr.count("Until then the reference kernels serve") == 1


def test_stale_binary_is_never_loaded(copy_of_package):
    shutil.copytree(PACKAGE.parent / "csrc", copy_of_package / "csrc")
    assert probe(copy_of_package)[0] == "cpp"  # sources as built
    with (copy_of_package / "csrc" / "common.h").open("a") as file:
        file.write("// changed after the build\n")
    serving, problem, stderr = probe(copy_of_package)
    assert serving == "reference"
    assert "is stale: csrc has changed" in problem
    assert "rebuild" in stderr


def test_binary_for_a_newer_torch_is_never_loaded(copy_of_package):
    path = binary(copy_of_package)
    path.write_bytes(path.read_bytes().replace(b"target=2.11", b"target=9.99"))
    assert "needs torch >= 9.99" in probe(copy_of_package)[1]


def test_something_else_under_the_binarys_name(copy_of_package):
    binary(copy_of_package).write_bytes(b"no shared object")
    serving, problem, _ = probe(copy_of_package)
    assert serving == "reference"
    assert "built for fastgan ?" in problem


def test_truncated_binary(copy_of_package):
    path = binary(copy_of_package)
    record = path.read_bytes().split(b"FASTGAN_BUILD{")[1].split(b"}")[0]
    path.write_bytes(b"FASTGAN_BUILD{" + record + b"}")
    serving, problem, _ = probe(copy_of_package)
    assert serving == "reference"
    assert "does not load" in problem


# The doctor


def test_doctor_json(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["fastgan"]["path"] == str(PACKAGE)
    assert set(report["operators"]) == set(fastgan.ops.references)
    for devices in report["operators"].values():
        for state in devices.values():
            assert state["serving"] in backends.NAMES
            assert state["serving"] not in state["not_serving"]
            assert all(state["not_serving"].values())


def test_doctor_text(capsys):
    with fastgan.use_backend("reference"):
        doctor.main([])
    text = capsys.readouterr().out
    assert "named by FASTGAN_BACKEND or use_backend" in text
    for op in fastgan.ops.references:
        assert f"{op} " in text


def test_doctor_command():
    result = subprocess.run([sys.executable, "-m", "fastgan", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"fastgan {fastgan.__version__}")
