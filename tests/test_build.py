"""setup.py: what it builds where, how it says so, and that a wheel holds what a checkout has."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastgan

ROOT = Path(__file__).parent.parent


def setup(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=root, capture_output=True, text=True, env=os.environ | environment
    )


@pytest.fixture
def no_compiler(tmp_path):
    """A PATH with no c++ and no nvcc."""
    return {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "NVCC": ""}


def test_pure_python_without_a_compiler_says_so_in_one_line(no_compiler):
    result = setup("--version", **no_compiler, FASTGAN_BUILD="auto")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("fastgan:")]
    assert said == ["fastgan: building pure Python (there is no C++ compiler (set CXX, or install g++))"]


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_an_explicit_choice_fails_loudly(no_compiler, wanted):
    result = setup("--version", **no_compiler, FASTGAN_BUILD=wanted)
    assert result.returncode != 0
    assert f"FASTGAN_BUILD={wanted}, but there is no C++ compiler" in result.stderr


def test_an_unknown_choice_fails():
    result = setup("--version", FASTGAN_BUILD="gpu")
    assert result.returncode != 0
    assert "'gpu' is none of auto, python, cpu, cuda" in result.stderr


def test_cuda_without_nvcc_fails_loudly(tmp_path):
    (tmp_path / "c++").symlink_to("/bin/true")
    result = setup("--version", PATH=str(tmp_path), CUDA_HOME=str(tmp_path), NVCC="", FASTGAN_BUILD="cuda")
    assert result.returncode != 0
    assert "FASTGAN_BUILD=cuda, but there is no nvcc (pip install 'fastgan[cuda-build]'" in result.stderr


def test_architectures_that_are_none_are_named(tmp_path):
    for name in ("c++", "nvcc", "ninja"):
        (tmp_path / name).symlink_to("/bin/true")
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    result = setup("--version", PATH=path, FASTGAN_BUILD="cuda", FASTGAN_CUDA_ARCHS="80;hopper")
    assert result.returncode != 0
    assert "FASTGAN_CUDA_ARCHS='80;hopper', expected compute capabilities such as '80;90'" in result.stderr


def wheel(folder: Path, **environment: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
        return [path.name, *archive.namelist()]


def test_pure_python_wheel(tmp_path):
    name, *files = wheel(tmp_path, FASTGAN_BUILD="python")
    assert name == f"fastgan-{fastgan.__version__}-py3-none-any.whl"
    assert not [file for file in files if file.endswith(".so")]
    packaged = {file for file in files if file.endswith(".py")}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgan").rglob("*.py")}
    here |= {f"fastgan/{folder}/{path.name}" for folder in ("benchmarks", "kernels") for path in (ROOT / folder).glob("*.py")}
    assert packaged == here


def test_native_wheel_runs_elsewhere(tmp_path):
    """One abi3 wheel, imported from outside the checkout, serves from its own binary and has its Triton kernels."""
    name, *files = wheel(tmp_path, FASTGAN_BUILD="cpu")
    assert "cp310-abi3" in name
    assert "fastgan/_C.abi3.so" in files
    code = (
        "import torch, fastgan; fastgan.minibatch_discrimination(torch.zeros(3, 2, 1)); import fastgan.kernels as k\n"
        "print(fastgan.__file__, fastgan._C.__file__, k.__file__, fastgan.backends.calls('cpp'), sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert run.returncode == 0, run.stderr
    *paths, calls = run.stdout.strip().split("|")
    site = str(tmp_path / "site" / "fastgan")
    assert all(path.startswith(site) for path in paths), paths
    assert int(calls) == 1


def test_source_distribution_has_every_native_source(tmp_path):
    result = setup("-q", "sdist", "-d", str(tmp_path), FASTGAN_BUILD="python")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "kernels/spectral_norm.py"} <= packed


def test_an_edit_compiles_what_depends_on_it(tmp_path):
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    (tmp_path / "fastgan").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastgan/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    sources = {
        "module.cpp": '#include "fastgan_build.h"\nconst char* record = FASTGAN_BUILD_RECORD;\n',
        "one.h": "inline int one() { return 1; }\n",
        "cpu/a.cpp": '#include "one.h"\nint a() { return one(); }\n',
        "cpu/b.cpp": "int b() { return 2; }\n",
    }
    for name, text in sources.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)

    def compiled() -> set[str]:
        result = setup("-q", "build_ext", "--build-lib", "out", root=tmp_path, FASTGAN_BUILD="cpu")
        assert result.returncode == 0, result.stderr
        assert list((tmp_path / "out").rglob("_C.abi3.so"))
        return {line.partition("compiling csrc/")[2] for line in result.stderr.splitlines() if "compiling" in line}

    assert compiled() == {"module.cpp", "cpu/a.cpp", "cpu/b.cpp"}
    assert compiled() == set()
    (tmp_path / "csrc" / "one.h").write_text("inline int one() { return 3; }\n")
    assert compiled() == {"module.cpp", "cpu/a.cpp"}  # every change is in the build record
    (tmp_path / "csrc" / "cpu" / "b.cpp").write_text("int b() { return }\n")
    result = setup("-q", "build_ext", "--build-lib", "out", root=tmp_path, FASTGAN_BUILD="cpu")
    assert result.returncode != 0
    assert "b.cpp" in result.stderr
