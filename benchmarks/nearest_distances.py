"""The k nearest of M points for each of N, as precision, recall, density and coverage want them, against what users write."""

import importlib.util

import torch

import fastgan

from .case import OURS, Case, name_of, numbers, sized

K = 3


def _whole(x, y):
    return torch.cdist(x, y).topk(K, dim=1, largest=False).values


def _in_blocks(x, y):
    """What bounds its memory, as evaluation scripts do, in blocks that stay in the cache."""
    return torch.cat([_whole(part, y) for part in x.split(256)])


def _keops(x, y):
    from pykeops.torch import LazyTensor

    return ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1).Kmin(K, dim=1).sqrt()


def _case(n: int, d: int, dtype=torch.float32) -> Case:
    def start(work=dtype):
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(n, d, generator=generator).to(dtype).to(work) for _ in range(2))

    def candidates():
        x, y = start()
        functions = {OURS: lambda x, y: fastgan.nearest_distances(x, y, k=K), "cdist": _whole, "cdist in blocks": _in_blocks}
        if (
            d <= 64 and dtype.itemsize >= 4 and importlib.util.find_spec("pykeops")
        ):  # it takes many minutes to compile for more coordinates
            functions["keops"] = _keops
        return {name: lambda function=function: (function(x, y),) for name, function in functions.items()}

    truth = lambda: (_whole(*start(torch.float64)),)  # noqa: E731
    flops = 2.0 * n * n * d  # the work is a matrix product
    name, kind = sized((n, d), dtype), name_of(dtype)
    return Case("nearest_distances", name, "forward", candidates, truth, {"best": 0.95}, flops=flops, dtype=kind)


def made(size: str, dtype: torch.dtype) -> list[Case]:
    form = f"NxD with N of at least {K}, such as 2048x128"
    n, d = numbers(size, form)
    if n < K:
        raise ValueError(f"size {size}: expected {form}")
    return [_case(n, d, dtype)]


CASES = [_case(4096, 64), _case(4096, 512), _case(4096, 2048)]
