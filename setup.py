"""Builds fastgan._C where torch and a compiler are at hand, and a pure-Python fastgan everywhere else.

FASTGAN_BUILD        auto (default): what this machine can build; python: no native code; cpu: the C++ kernels;
                     cuda: the C++ and CUDA kernels. Anything but auto fails loudly where it can't be had.
FASTGAN_CUDA_ARCHS   compute capabilities, e.g. "80;90" (default 80;86;89;90;100, and PTX of the last)
CUDA_HOME, NVCC      where nvcc is, when it is not on PATH. Neither a GPU nor a CUDA build of torch is needed.
MAX_JOBS             compilers that run at once (default: a processor each)
NVCC_APPEND_FLAGS    nvcc's own: -lineinfo for a profiler that shows source lines (twice the size, an eighth more time)
"""

import hashlib
import itertools
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = (ROOT / "fastgan" / "_version.py").read_text().split('"')[1]
TORCH_TARGET = (2, 11)  # the oldest torch the binary runs with
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
        elif find_ninja() is None:
            problem = "there is no ninja (pip install ninja)"
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
    """One compilation up to Hopper and one from Blackwell on, each for its oldest; the others' machine code is made of its PTX.

    Of Ampere's, Hopper's is as good as of its own, but Blackwell's has up to a fifth more instructions.
    """
    asked = os.environ.get("FASTGAN_CUDA_ARCHS", "80;86;89;90;100").replace(".", "").split(";")
    archs = [arch.strip() for arch in asked if arch.strip()]
    if not archs or not all(re.fullmatch(r"\d{2,3}[a-z]?", arch) for arch in archs):
        raise SystemExit(f"fastgan: FASTGAN_CUDA_ARCHS={';'.join(asked)!r}, expected compute capabilities such as '80;90'")
    archs.sort(key=lambda arch: int(arch.rstrip(string.ascii_letters)))
    flags = []
    # An architecture with a letter, as in 90a, takes PTX of no other and gives it to none.
    for _, some in itertools.groupby(archs, key=lambda arch: arch if arch[-1].isalpha() else int(arch) >= 100):
        some = list(some)
        codes = [f"sm_{arch}" for arch in some] + [f"compute_{some[0]}"] * (some[-1] == archs[-1])
        flags.append(f"-gencode=arch=compute_{some[0]},code=[{','.join(codes)}]")
    return flags, "+".join(archs)


def find_ninja() -> str | None:
    """On PATH, or as the package from PyPI brings it, which need not be on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def compile_sources(commands: dict[Path, list[str]], folder: Path, jobs: int) -> list[str]:
    """The objects of sources; ninja makes those again whose command, text or headers have changed."""

    def escaped(text, also: str = "") -> str:
        return re.sub(rf"[$\n{also}]", lambda found: "$" + found[0], str(text))

    lines = ["rule compile", "  command = $compiler -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["  description = compiling $name"]
    objects = {}
    for source, command in commands.items():
        name = source.relative_to(ROOT).as_posix()
        objects[source] = folder / (name.replace("/", ".") + ".o")
        lines += [f"build {escaped(objects[source], ' :')}: compile {escaped(source, ' :')}"]
        lines += [f"  compiler = {escaped(shlex.join(command))}", f"  name = {escaped(name)}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    # Its progress is no output of ours: tools that build packages read that.
    if subprocess.run([find_ninja(), "-C", str(folder), "-j", str(jobs)], stdout=sys.stderr).returncode:
        raise SystemExit("fastgan: the native kernels did not compile; the compiler's words are above")
    return list(map(str, objects.values()))


def extension(kind: str) -> dict:
    import torch
    from torch.utils.cpp_extension import CppExtension

    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    gencode, archs = cuda_flags() if kind == "cuda" else ([], "none")
    oldest = f"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
    record = f"version={VERSION};sources={sources_digest()};target={oldest};torch={torch.__version__};cuda={archs}"
    header, text = build / "fastgan_build.h", f'#define FASTGAN_BUILD_RECORD "{record}"\n'
    if not header.exists() or header.read_text() != text:
        header.write_text(text)

    csrc = ROOT / "csrc"
    folders = (csrc, csrc / "cpu", *([csrc / "cuda"] if kind == "cuda" else []))
    # Long ones first, lest a compiler goes on alone at the end.
    cpp = sorted((path for folder in folders for path in folder.glob("*.cpp")), key=lambda path: -path.stat().st_size)
    cuda = sorted(csrc.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size) if kind == "cuda" else []

    class Build(build_ext):
        def build_extension(self, ext):
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            cxx, includes = os.environ.get("CXX", "c++"), [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
            # Python's own flags but for debug information: a third of the compilers' time and nine tenths of the objects.
            flags = [
                *dropwhile(lambda word: not word.startswith("-"), self.compiler.compiler_so),
                "-g0",
                *ext.extra_compile_args,
            ]
            commands = {source: [cxx, *flags, *includes] for source in cpp}
            if cuda:  # nvcc alone: torch's own CUDAExtension insists on a CUDA build of torch
                threads = f"--threads={max(1, jobs // len(cuda))}"
                flags = ["-O3", "-std=c++20", threads, "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode]
                commands = {source: [find_nvcc(), *flags, f"-I{csrc}"] for source in cuda} | commands
            ext.extra_objects = ext.depends = compile_sources(commands, build / "objects", jobs)
            ext.sources, self.force = [], True
            super().build_extension(ext)

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
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    python = "-DPy_LIMITED_API=0x030a0000"
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", target, python]
    ext = CppExtension(
        "fastgan._C",
        sources=[str(path.relative_to(ROOT)) for path in cpp],
        include_dirs=[str(csrc), str(build)],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


kind, why = what_to_build()
say(f"building {'pure Python' if kind == 'python' else 'fastgan._C with ' + kind + ' kernels'}" + (f" ({why})" if why else ""))
setup(**(extension(kind) if kind != "python" else {}))
