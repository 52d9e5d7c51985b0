"""Which kernels serve which device: loads ``fastgan._C``, registers Triton, and lets the user choose.

A backend fills dispatcher slots of the operators in ``fastgan.ops``:

=========  =======  =====================================================================
reference  any      plain torch, always there
cpp        CPU      ``fastgan._C`` (csrc/cpu), the default on CPU where it was built
triton     CUDA     ``fastgan.kernels``, the default on GPUs; on CPU under TRITON_INTERPRET=1
cuda       CUDA     ``fastgan._C`` built with nvcc (csrc/cuda): before Triton where it has been
                    compiled for the GPUs at hand, being called costs it a third of the time
=========  =======  =====================================================================
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import mmap
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastgan._version import __version__
from fastgan.ops import executed, references
from fastgan.ops._declare import NAMESPACE, counted

NAMES = ("reference", "cpp", "triton", "cuda")
DEVICES = ("cpu", "cuda")
NO_KERNEL = "fastgan._C has no kernel of it"
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_PACKAGE = Path(__file__).parent


def _capabilities() -> list[tuple[int, int]]:
    """Of the GPUs at hand, from the driver: asking CUDA would start it in this process, after which it can't be forked."""
    count, major, minor, device = *(ctypes.c_uint() for _ in range(3)), ctypes.c_void_p()
    found = []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return []
        failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for i in range(count.value):
            failed |= nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device))
            failed |= nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
            found.append((major.value, minor.value))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one that knows another NVML
        return []
    return [] if failed else found


def runs_on(archs: str, capabilities: list[tuple[int, int]]) -> bool:
    """Does a binary built for ``archs``, such as "80+90" and PTX of the last, run on each of these GPUs, of which there are?"""
    built = [divmod(int(arch), 10) for arch in archs.split("+") if arch.isdecimal()]
    return bool(built and capabilities) and all(
        (major, minor) >= built[-1] or any(major == of and minor >= at_least for of, at_least in built)
        for major, minor in capabilities
    )


@dataclass
class Extension:
    """The state of ``fastgan._C``: its build record, and the reason where it is not used."""

    path: Path | None = None
    record: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    slots: frozenset[tuple[str, str]] = frozenset()  # (operator, dispatch key) that it fills
    gpus: bool | None = None  # has it been compiled for those at hand? None: there are none, or they can't be told

    @property
    def loaded(self) -> bool:
        return self.problem is None


def _read_record(path: Path) -> dict[str, str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b"FASTGAN_BUILD{")
        text = data[start : data.find(b"}", start)].decode() if start >= 0 else ""
    return dict(pair.split("=", 1) for pair in text.partition("{")[2].split(";") if "=" in pair)


def _sources_digest(root: Path) -> str | None:
    """Of the native sources beside the package in a checkout, as setup.py writes it into the binary; None elsewhere."""
    if not (root / "csrc" / "module.cpp").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def inspect_extension(package: Path = _PACKAGE) -> Extension:
    """Find the binary and decide, from the record inside it and without loading it, whether it belongs to this fastgan."""
    found = sorted(package.glob("_C*.so"))
    if not found:
        return Extension(problem="fastgan._C is not built (pip install --no-build-isolation, with torch and a C++ compiler)")
    path = found[-1]
    record = _read_record(path)
    rebuild = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps, or make in a checkout"
    expected = _sources_digest(package.parent)
    if record.get("version") != __version__:
        problem = f"{path.name} was built for fastgan {record.get('version', '?')}, this is {__version__}; {rebuild}"
    elif expected is not None and record.get("sources") != expected:
        problem = f"{path.name} is stale: csrc has changed since it was built; {rebuild}"
    elif _version_tuple(torch.__version__) < _version_tuple(record["target"]):
        problem = f"{path.name} needs torch >= {record['target']}, this is {torch.__version__}"
    else:
        problem = None
    return Extension(path, record, problem)


def _load_extension() -> Extension:
    extension = inspect_extension()
    if extension.loaded:
        try:
            importlib.import_module("fastgan._C")
        except ImportError as error:
            extension.problem = f"{extension.path.name} does not load: {error}"
        else:
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            extension.slots = frozenset(
                (op, key) for op in references for key in _KEYS.values() if has(f"{NAMESPACE}::{op}", key)
            )
            archs = extension.record.get("cuda", "none")
            if torch.version.cuda and archs != "none" and (gpus := _capabilities()):
                extension.gpus = runs_on(archs, gpus)
    elif extension.path is not None:  # an absent binary is a choice, a wrong one is a mistake
        warnings.warn(f"fastgan: {extension.problem}. Until then the reference kernels serve.", stacklevel=3)
    return extension


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem(op: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastgan[triton]')"
    stem = _stem(op)
    try:
        found = importlib.util.find_spec(f"fastgan.kernels.{stem}")
    except ModuleNotFoundError:
        found = None
    return None if found else f"fastgan.kernels.{stem} is not installed"


def _stem(op: str) -> str:
    """The file an operator lives in, under fastgan/ops, kernels and csrc alike."""
    return references[op].__module__.rpartition(".")[2]


def _triton_kernel(op: str) -> Callable:
    @functools.cache
    def imported():  # when it is first called: Triton takes a while
        return getattr(importlib.import_module(f"fastgan.kernels.{_stem(op)}"), op)

    return counted("triton", op, lambda *inputs: imported()(*inputs))


def problem(backend: str, op: str, device: str) -> str | None:
    """Why ``backend`` can't serve ``op`` on ``device`` ("cpu" or "cuda"); None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        missing = _triton_problem(op)
        if missing is None and device == "cpu" and not _triton_interprets():
            return "Triton kernels run on GPUs; on CPU only with TRITON_INTERPRET=1 set before Python starts (slow, for tests)"
        return missing
    home = "cpu" if backend == "cpp" else "cuda"
    if device != home:
        return f"backend {backend!r} has kernels for {home} tensors"
    if not extension.loaded:
        return extension.problem
    if (op, _KEYS[device]) not in extension.slots:
        if backend == "cuda" and extension.record.get("cuda") == "none":
            return "fastgan._C was built without CUDA (no nvcc; FASTGAN_BUILD=cuda)"
        return NO_KERNEL
    if backend == "cuda" and extension.gpus is False:
        return f"fastgan._C was built for sm_{extension.record['cuda']}, and a GPU here is another (FASTGAN_CUDA_ARCHS)"
    return None


def _by_default(op: str, device: str) -> str:
    on_gpu = ("cuda", "triton") if extension.gpus else ("triton", "cuda")
    order = (("cpp",) if device == "cpu" else on_gpu) + ("reference",)
    return next(name for name in order if problem(name, op, device) is None)


def serving(op: str, device: str) -> str:
    """The backend that runs ``op`` on ``device`` now."""
    if _chosen:
        return "none" if problem(_chosen, op, device) else _chosen
    return _by_default(op, device)


def _refusal(backend: str, op: str, device: str) -> Callable:
    def refuse(*inputs):
        why = problem(backend, op, device)
        raise RuntimeError(
            f"fastgan::{op}: backend {backend!r} was asked for but can't serve {device} tensors: {why}. "
            f"Move the tensors, choose another of {', '.join(NAMES)}, or leave the choice to fastgan."
        )

    return refuse


def _slots_for(backend: str | None) -> dict[tuple[str, str], Callable]:
    """(operator, dispatch key) -> what has to lie over the native kernels so that ``backend`` serves. None: the defaults."""
    slots = {}
    for op, reference in references.items():
        for device, key in _KEYS.items():
            if backend is None:
                serves = _by_default(op, device)
                if serves == "triton":
                    slots[op, key] = _triton_kernel(op)
                elif serves == "reference" and (op, key) in extension.slots:  # for other GPUs
                    slots[op, key] = counted("reference", op, reference)
            elif problem(backend, op, device) is not None:
                slots[op, key] = _refusal(backend, op, device)
            elif backend == "reference":
                slots[op, key] = counted("reference", op, reference)
            elif backend == "triton":
                slots[op, key] = _triton_kernel(op)
    return slots


_chosen: str | None = None
_overlay: torch.library.Library | None = None


def _choose(backend: str | None) -> None:
    global _chosen, _overlay
    if _overlay is not None:
        _overlay._destroy()
    _overlay = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # the dispatcher remarks that a slot was filled before: here it is meant
        warnings.simplefilter("ignore")
        for (op, key), kernel in _slots_for(backend).items():
            _overlay.impl(op, kernel, key)
    _chosen = backend


class use_backend:
    """Serve every fastgan operator from one backend inside a ``with`` block; process-wide, backward threads included.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available here, with the reason; or, when an operator is called, it can't
            serve that operator's device. Nothing falls back silently while a backend is named.

    The environment variable ``FASTGAN_BACKEND`` names one for a whole process.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"use_backend: name is {name!r}, expected one of {', '.join(map(repr, NAMES))}")
        if all(problem(name, op, device) for op in references for device in DEVICES):
            why = problem(name, next(iter(references)), "cpu" if name == "cpp" else "cuda")
            raise RuntimeError(f"use_backend: {name!r} is not available here: {why}. See: fastgan doctor")
        self.name = name

    def __enter__(self):
        self._outer = _chosen
        _choose(self.name)
        return self

    def __exit__(self, *exception):
        _choose(self._outer)


def calls(backend: str) -> int:
    """How many kernels ``backend`` has run in this process: for tests and diagnosis."""
    if backend in ("cpp", "cuda"):
        return importlib.import_module("fastgan._C").calls() if extension.loaded else 0
    return sum(count for (name, _), count in executed.items() if name == backend)


extension = _load_extension()
_choose(None)
if os.environ.get("FASTGAN_BACKEND"):
    use_backend(os.environ["FASTGAN_BACKEND"]).__enter__()
