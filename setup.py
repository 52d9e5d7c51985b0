"""Builds fastgan._C where torch and a compiler are at hand, and a pure-Python fastgan everywhere else.

FASTGAN_BUILD        auto (default): what this machine can build; python: no native code; cpu: the C++ kernels;
                     cuda: the C++ and CUDA kernels. Anything but auto fails loudly where it can't be had.
FASTGAN_CUDA_ARCHS   compute capabilities, e.g. "80;90" (default 80;86;89;90;100, and PTX of the last)
CUDA_HOME, NVCC      where nvcc is, when it is not on PATH. Neither a GPU nor a CUDA build of torch is needed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
VERSION = (ROOT / "fastgan" / "_version.py").read_text().split('"')[1]
TORCH_TARGET = (2, 13)  # the oldest torch the binary runs with
CHOICES = ("auto", "python", "cpu", "cuda")


def say(text: str) -> None:
    print(f"fastgan: {text}", file=sys.stderr)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("NVCC"), home and str(Path(home, "bin", "nvcc")), shutil.which("nvcc")]
    try:  # the compiler from PyPI (extra cuda-build) brings no command onto PATH
        import nvidia

        candidates += [str(path) for root in nvidia.__path__ for path in sorted(Path(root).glob("*/bin/nvcc"))]
    except ImportError:
        pass
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def toolkit(nvcc: str) -> Path:
    """The folder nvcc belongs to, as it says itself: the command on PATH may be a script or a link."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def what_to_build() -> tuple[str, str]:
    """(python | cpu | cuda, why not more)."""
    wanted = os.environ.get("FASTGAN_BUILD", "auto").lower()
    if wanted not in CHOICES:
        raise SystemExit(f"fastgan: FASTGAN_BUILD={wanted!r} is none of {', '.join(CHOICES)}")
    if wanted == "python":
        return "python", "FASTGAN_BUILD=python"
    problem = None
    try:
        import torch
    except ImportError:
        problem = "torch is not importable in the build environment (pip install --no-build-isolation uses yours)"
    else:
        found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if found < TORCH_TARGET:
            problem = f"torch {torch.__version__} is older than {TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
        elif compiler is None:
            problem = "there is no C++ compiler (set CXX, or install g++)"
        elif sys.platform == "win32":
            problem = "the native kernels need GCC or Clang"
    if problem:
        if wanted == "auto":
            return "python", problem
        raise SystemExit(f"fastgan: FASTGAN_BUILD={wanted}, but {problem}")
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if wanted == "cpu":
        return "cpu", "FASTGAN_BUILD=cpu"
    if find_nvcc() and cuda_sources:
        return "cuda", ""
    problem = "there is no nvcc (pip install 'fastgan[cuda-build]', or set CUDA_HOME)" if cuda_sources else "no CUDA sources"
    if wanted == "cuda":
        raise SystemExit(f"fastgan: FASTGAN_BUILD=cuda, but {problem}")
    return "cpu", problem


def sources_digest() -> str:
    """Of every native source: fastgan/backends.py computes the same in a checkout to recognise a stale binary."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_flags() -> tuple[list[str], str]:
    archs = [
        a.strip().replace(".", "") for a in os.environ.get("FASTGAN_CUDA_ARCHS", "80;86;89;90;100").split(";") if a.strip()
    ]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"], "+".join(archs)


def extension(kind: str) -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    gencode, archs = cuda_flags() if kind == "cuda" else ([], "none")
    oldest = f"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
    record = f"version={VERSION};sources={sources_digest()};target={oldest};torch={torch.__version__};cuda={archs}"
    header = build / "fastgan_build.h"
    text = f'#define FASTGAN_BUILD_RECORD "{record}"\n'
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    includes = [str(ROOT / "csrc"), str(build)]

    class Build(BuildExtension):
        def build_extensions(self):
            if kind == "cuda":
                self.extensions[0].extra_objects = compile_cuda()
            super().build_extensions()

    def compile_cuda() -> list[str]:
        """With nvcc alone: torch's own CUDAExtension insists on a CUDA build of torch."""
        nvcc, objects = find_nvcc(), []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            output = build / f"{source.stem}.{archs}.cu.o"
            headers = (*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"))
            newest = max(p.stat().st_mtime for p in (*headers, source))
            if not output.exists() or output.stat().st_mtime < newest:
                flags = [
                    "-O3",
                    "-std=c++20",
                    "-lineinfo",
                    "--threads=0",
                    "-Xcompiler=-fPIC,-fvisibility=hidden",
                    "-DUSE_CUDA",
                    target,
                ]
                paths = [f"-I{path}" for path in (*includes, *include_paths())]
                subprocess.run([nvcc, "-c", str(source), "-o", str(output), *flags, *gencode, *paths], check=True)
            objects.append(str(output))
        return objects

    link = []
    if kind == "cuda":
        home = toolkit(find_nvcc())
        libraries = (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib")
        where = next((path for path in libraries if (path / "libcudart_static.a").exists()), None)
        if where is None:
            raise SystemExit(
                f"fastgan: libcudart_static.a is nowhere under {home} (pip install 'fastgan[cuda-build]' brings it)"
            )
        link = [f"-L{where}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    cpp = CppExtension(
        "fastgan._C",
        sources=[
            str(p.relative_to(ROOT))
            for folder in ("", "cpu", *(["cuda"] if kind == "cuda" else []))
            for p in sorted((ROOT / "csrc" / folder).glob("*.cpp"))
        ],
        include_dirs=includes,
        depends=[str(header)],
        extra_compile_args=["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", target],
        extra_link_args=link,
        py_limited_api=True,
    )
    return {
        "ext_modules": [cpp],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


kind, why = what_to_build()
say(f"building {'pure Python' if kind == 'python' else 'fastgan._C with ' + kind + ' kernels'}" + (f" ({why})" if why else ""))
setup(**(extension(kind) if kind != "python" else {}))
