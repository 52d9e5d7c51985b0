"""Sums of kernels over pairs, and MMD, against plain torch, torch.compile, KeOps and GeomLoss."""

import importlib.util

import torch
from torch import Tensor

import fastgan

from .case import OURS, Case, cdist, name_of, numbers, sized

N, D = 4096, 64
#: Of features such as Inception's, whose kernel inception distance the polynomial kernel is.
MANY = 2048


def bandwidth_of(kernel: str, d: int) -> float:
    """About the median distance between the points, where the kernel is one of distances."""
    return {"laplacian": 1.125 * d, "gaussian": 1.375 * d**0.5, "energy": 1.0, "polynomial": float(d)}[kernel]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)


def kernel_of(kernel: str, s: float):
    """What plain torch makes of each: the (N, M) matrix, by the fastest formula that torch has for it."""
    return {
        "laplacian": lambda x, y: torch.exp(cdist(x, y, p=1) / -s),
        "gaussian": lambda x, y: torch.exp(squared_distances(x, y) / (-2 * s * s)),
        "energy": lambda x, y: torch.cdist(x, y) / -s,
        "polynomial": lambda x, y: (x @ y.T / s + 1).pow(3),
    }[kernel]


def compilable_of(kernel: str, s: float):
    """The same where torch.compile does better with another formula: distances by broadcasting, which it fuses."""
    if kernel == "laplacian":
        return lambda x, y: torch.exp((x[:, None] - y).abs().sum(-1) / -s)
    return kernel_of(kernel, s)


def keops_of(kernel: str, s: float):
    from pykeops.torch import LazyTensor

    def function(x, y):
        a, b = LazyTensor(x[:, None].contiguous()), LazyTensor(y[None].contiguous())
        k = {
            "laplacian": lambda: (-(a - b).abs().sum(-1) / s).exp(),
            "gaussian": lambda: (-((a - b) ** 2).sum(-1) / (2 * s * s)).exp(),
        }[kernel]()
        return k.sum(1).squeeze(-1)

    return function


def functions(kernel: str, d: int) -> dict:
    s = bandwidth_of(kernel, d)
    plain, compilable = kernel_of(kernel, s), compilable_of(kernel, s)
    torch._dynamo.reset()
    found = {
        OURS: lambda x, y: fastgan.pairwise_kernel_sum(x, y, kernel=kernel, bandwidths=s),
        "torch": lambda x, y: plain(x, y).sum(1),
        "compile": torch.compile(lambda x, y: compilable(x, y).sum(1), dynamic=False),
    }
    if d == D and kernel in ("laplacian", "gaussian") and importlib.util.find_spec("pykeops"):  # the others take it seconds
        found["keops"] = keops_of(kernel, s)
    return found


def discrepancies() -> dict:
    s = bandwidth_of("gaussian", D)
    k = kernel_of("gaussian", s)

    def plain(x, y):
        return k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()

    torch._dynamo.reset()
    found = {
        OURS: lambda x, y: fastgan.mmd(x, y, bandwidths=s),
        "torch": plain,
        "compile": torch.compile(plain, dynamic=False),
    }
    if importlib.util.find_spec("geomloss"):
        from geomloss import SamplesLoss

        # with KeOps, its other way, it takes seconds on a CPU
        loss = SamplesLoss("gaussian", blur=s, backend="tensorized")
        found["geomloss"] = lambda x, y: 2 * loss(x, y)  # it halves the square
    return found


def _points(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), 0.9 * torch.randn(m, d, generator=generator) + 0.1


def _run(mode: str, function, x: Tensor, y: Tensor):
    """Of x, what a generator makes, or of both."""
    x, y = x.clone().requires_grad_("backward" in mode), y.clone().requires_grad_("both" in mode)

    def run():
        out = function(x, y)
        wanted = [z for z in (x, y) if z.requires_grad]
        return torch.autograd.grad(out.sum(), wanted) if wanted else (out,)

    return run


MODES = ("forward", "forward+backward", "forward+backward of both")


def _case(name: str, mode: str, goal: float | None, d: int = D, n: int = N, m: int = N, dtype=torch.float32) -> Case:
    make = discrepancies if name == "mmd" else lambda: functions(name, d)

    def candidates():
        x, y = (z.to(dtype) for z in _points(n, m, d))
        return {name: _run(mode, function, x, y) for name, function in make().items()}

    def truth():
        x, y = (z.to(dtype) for z in _points(n, m, d))
        if name == "mmd":
            function = lambda x, y: fastgan.mmd(x, y, bandwidths=bandwidth_of("gaussian", D))  # noqa: E731
        else:
            function = lambda x, y: fastgan.pairwise_kernel_sum(x, y, kernel=name, bandwidths=bandwidth_of(name, d))  # noqa: E731
        with fastgan.use_backend("reference"):
            return _run(mode, function, x.double(), y.double())()

    # the difference of means is small, and what is left of their digits few
    tolerance, goals = 1e-3 if name == "mmd" else 1e-4, {"best": goal} if goal else {}
    shape, kind = f"{name} {sized((n, m, d), dtype)}", name_of(dtype)
    return Case("pairwise_kernel_sum", shape, mode, candidates, truth, goals, tolerance, dtype=kind)


KERNELS = ("laplacian", "gaussian", "energy", "polynomial")


def made(size: str, dtype: torch.dtype) -> list[Case]:
    form = f"NxMxD, such as 1024x1024x32, for all of {', '.join(KERNELS)}, or with one before it, 'gaussian 1024x1024x32'"
    *kernel, shape = size.split()
    if len(kernel) > 1 or not set(kernel) <= set(KERNELS):
        raise ValueError(f"size {size}: expected {form}")
    n, m, d = numbers(shape, form)
    return [_case(name, mode, None, d, n, m, dtype) for name in kernel or KERNELS for mode in MODES]


CASES = [
    *(_case("laplacian", mode, 5.0) for mode in MODES),
    *(_case(kernel, mode, 0.95) for kernel in KERNELS[1:] for mode in MODES[:2]),
    *(_case(kernel, MODES[2], 0.95) for kernel in KERNELS[1:]),
    *(_case(kernel, mode, 0.95, MANY) for kernel in ("gaussian", "polynomial") for mode in ("forward", "forward+backward")),
    _case("mmd", "forward+backward", 0.95),
]
