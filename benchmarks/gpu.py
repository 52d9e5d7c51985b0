"""GPU kernels: what they move and compute, predicted times, and on a machine with a GPU measured ones.

``python -m benchmarks.gpu`` prints the tables, ``--write docs/gpu.md`` puts them there. A prediction is max(bytes / bandwidth,
operations / rate) + launches * LAUNCH; nothing in it has been measured. Launches are counted: kernels of fastgan by standing in
for them, plain PyTorch's by a dispatch mode on tensors without memory.

``--measure FILE.json`` measures on this machine's GPU, after results have agreed with float64: an operator's *kernels*,
replayed from a CUDA graph with L2 flushed before each (medians by CUDA events), the operator *as called* from Python, back to
back, and critic steps (gpu_steps.py). Files in benchmarks/results/gpu are shown as tables of their own.
"""

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import gpu_steps

#: bandwidth in bytes/s and 32-bit operations/s (a multiply-add counts once), from the makers' data sheets (SXM, 80 GB; B200)
GPUS = {"A100": (2.04e12, 9.75e12), "H100": (3.35e12, 33.5e12), "B200": (8.0e12, 37.5e12)}
LAUNCH = 4e-6  # seconds per kernel: an assumption, of the order of what launching from Python takes
NOT_KERNELS = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view")


@dataclass(frozen=True)
class Case:
    """One operator, forward and backward. ``bytes`` and ``operations`` are those of fastgan's kernels.

    ``inputs(device)`` makes tensors; ``kernels(module, *inputs)`` calls what one step calls in a module of fastgan.kernels.
    """

    op: str
    shape: str
    inputs: Callable
    kernels: Callable
    fastgan: Callable  # of the inputs: what is differentiated
    eager: Callable
    bytes: int
    operations: float


def _leaf(*shape):
    return lambda device: [torch.randn(*shape, device=device, requires_grad=True)]


def _pairs(b, k, d) -> Case:
    def eager(m):
        return (m[:, None] - m[None]).abs().sum(-1).neg().exp().sum(1)

    def kernels(module, m):
        module.minibatch_discrimination_backward(module.minibatch_discrimination(m, True), m)

    import fastgan

    m, out = 4 * b * k * d, 4 * b * k
    # per ordered pair and component: 3 for the distance, and backward 3 again, 3 for the sign and 1 for the sum
    operations = b * b * k * (10 * d + 10)
    return Case(
        "minibatch_discrimination", f"{b}x{k}x{d}", _leaf(b, k, d), kernels, fastgan.minibatch_discrimination, eager,
        m + out + 2 * m + out, operations,
    )  # fmt: skip


def _stddev(b, c, h, w) -> Case:
    import fastgan

    def eager(x):
        groups = x.view(4, -1, c, h, w)
        deviation = ((groups - groups.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)
        return torch.cat([x, deviation.repeat(4, 1, h, w)], 1)

    def kernels(module, x):
        form = (b // 4, True, 1, False, 1e-8)
        module.minibatch_stddev_backward(module.minibatch_stddev(x, *form), x, *form)

    size = 4 * b * c * h * w
    return Case(
        "minibatch_stddev", f"{b}x{c}x{h}x{w}", _leaf(b, c, h, w), kernels, fastgan.minibatch_stddev, eager, 5 * size, 5 * size
    )


def _penalty(*shape) -> Case:
    def eager(grads):
        return 10 * (grads.flatten(1).norm(2, dim=1) - 1).square().mean()

    def ours(grads):
        return torch.ops.fastgan.gradient_penalty(grads, "gradient_penalty", 10.0, 1.0, False, 2.0)[0]

    def kernels(module, grads):
        _, _, factors, _ = module.gradient_penalty(grads, "gradient_penalty", 10.0, 1.0, False, 2.0)
        module.gradient_penalty_backward(grads, factors)

    size = 4 * torch.Size(shape).numel()
    return Case(
        "gradient_penalty", "x".join(map(str, shape)), _leaf(*shape), kernels, ours, eager, 5 * size, size
    )  # fmt: skip


def _tangents(*shape) -> Case:
    def inputs(device):
        return [torch.randn(*shape, device=device), torch.randn(*shape, device=device), torch.randn(shape[0], device=device)]

    def eager(t, a, factors):
        passed = torch.where(a > 0, t, 0.2 * t)
        return passed, factors.view(-1, *[1] * (t.dim() - 1)) * a + passed

    size = 4 * torch.Size(shape).numel()
    return Case(
        "tangent_combine", "x".join(map(str, shape)), inputs, lambda module, *x: module.tangent_combine(*x, 0.2),
        lambda *x: torch.ops.fastgan.tangent_combine(*x, 0.2), eager, 4 * size, size,
    )  # fmt: skip


def _sums(kernel: str, n: int, d: int) -> Case:
    """Gradients of both sets of points."""

    @functools.cache  # a CUDA graph can't hold the copy that makes it
    def mixture(dtype, device):
        return torch.tensor([d**0.5], dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)

    def options(x):
        return *mixture(x.dtype, x.device), kernel, 1.0, 0.0, False

    def inputs(device):
        return [torch.randn(n, d, device=device, requires_grad=True) for _ in range(2)]

    def eager(x, y):
        if kernel == "laplacian":
            return torch.exp(torch.cdist(x, y, p=1) / -(d**0.5)).sum(1)
        return torch.exp((x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)) / (-2 * d)).sum(1)

    def kernels(module, x, y):
        module.pairwise_kernel_sum_backward_both(module.pairwise_kernel_sum(x, y, *options(x)), x, y, *options(x))

    points, slopes, pairs = 8 * n * d, 4 * n * n, n * n
    # per pair and coordinate: 2 for the distance, forward and backward, and 4 or 2 for each of the gradients
    return Case(
        "pairwise_kernel_sum", f"{kernel} {n}x{d}", inputs, kernels,
        lambda x, y: torch.ops.fastgan.pairwise_kernel_sum(x, y, *options(x)), eager,
        6 * points + 3 * slopes, pairs * (d * (4 + 2 * (4 if kernel == "laplacian" else 2)) + 20),
    )  # fmt: skip


#: (rows, columns) of the weights of discriminators
DISCRIMINATORS = {
    "SNGAN-32": [(128, 27), (128, 1152), (128, 27), *[(128, 1152)] * 4, (128, 128), *[(128, 1152)] * 2, (1, 128)],
    "DCGAN-128": [(64, 48), (128, 1024), (256, 2048), (512, 4096), (1024, 8192), (1, 16384)],
    "BigGAN-128": [
        (96, 27), (96, 864), (96, 27), (192, 864), (192, 1728), (192, 96), (384, 1728), (384, 3456), (384, 192),
        (768, 3456), (768, 6912), (768, 384), (1536, 6912), (1536, 13824), (1536, 768), (1536, 13824), (1536, 13824), (1, 1536),
    ],
}  # fmt: skip


def _spectral(name: str) -> Case:
    shapes = DISCRIMINATORS[name]

    def inputs(device):
        weights = [(torch.randn(shape, device=device) / shape[1] ** 0.5).requires_grad_() for shape in shapes]
        unit = lambda n: torch.nn.functional.normalize(torch.randn(n, device=device), dim=0)  # noqa: E731
        return [*weights, *(unit(rows) for rows, _ in shapes), *(unit(columns) for _, columns in shapes)]

    def split(tensors):
        n = len(shapes)
        return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])

    def ours(*tensors):
        return torch.ops.fastgan.spectral_norm_multi(*split(tensors), [0] * len(shapes), 1, 1e-12, False, 1.0, False)[0]

    def kernels(module, *tensors):
        weights, u, v = split([x.detach() for x in tensors])
        dims = [0] * len(shapes)
        _, _, _, sigma = module.spectral_norm_multi(weights, u, v, dims, 1, 1e-12, False, 1.0, False)
        module.spectral_norm_multi_backward(weights, weights, u, v, sigma, dims, 1.0, False)

    def eager(*tensors):  # as torch.nn.utils.parametrizations.spectral_norm does it
        results = []
        for weight, u, v in zip(*split(tensors), strict=True):
            with torch.no_grad():
                u = torch.nn.functional.normalize(torch.mv(weight, v), dim=0, eps=1e-12, out=torch.empty_like(u))
                v = torch.nn.functional.normalize(torch.mv(weight.H, u), dim=0, eps=1e-12, out=torch.empty_like(v))
            u, v = u.clone(), v.clone()
            results.append(weight / torch.vdot(u, torch.mv(weight, v)))
        return results

    size = 4 * sum(rows * columns for rows, columns in shapes)
    return Case("spectral_norm", f"{name} D", inputs, kernels, ours, eager, 7 * size, 3 * size)


def cases() -> list[Case]:
    return [
        _pairs(64, 50, 5), _pairs(256, 64, 16), _pairs(1024, 64, 16),
        _stddev(16, 512, 4, 4), _stddev(64, 512, 4, 4),
        _penalty(64, 3, 64, 64), _penalty(16, 3, 256, 256),
        _tangents(64, 64, 64, 64),
        _sums("gaussian", 4096, 64), _sums("laplacian", 4096, 64),
        *map(_spectral, DISCRIMINATORS),
    ]  # fmt: skip


class Counted(TorchDispatchMode):
    """Kernels that plain PyTorch launches, and the bytes of the tensors they take and give; views launch none."""

    launches = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not view and function._schema.name.partition("::")[2] not in NOT_KERNELS:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            distinct = {id(x): min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors}
            self.bytes += sum(distinct.values())
        return result


def step_of(function: Callable, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and, where there is something to differentiate, backward with gradients of 1 that are made beforehand."""
    leaves = [x for x in inputs if x.requires_grad]
    outputs = function(*inputs)
    ones = [torch.ones_like(x) for x in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    def run():
        outputs = function(*inputs)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        return outputs + list(torch.autograd.grad(outputs, leaves, ones) if leaves else [])

    return run


def eager_counts(case: Case) -> tuple[int, int]:
    """(launches, bytes) of the formula in plain PyTorch."""
    run = step_of(case.eager, case.inputs("meta"))
    with Counted() as counted:
        run()
    return counted.launches, counted.bytes


class _Launches(list):
    def stand_in(self, name):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *_, **__: self.append(name)

        return Kernel()


def kernel_counts(case: Case) -> tuple[int, int]:
    """(launches, bytes of what plain PyTorch does around them) of fastgan's Triton kernels."""
    module = importlib.import_module(f"fastgan.kernels.{case.op}")
    launches = _Launches()
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    inputs = [x.detach() for x in case.inputs("cpu")]
    tables = [x for x in ("table",) if hasattr(module, x)]  # on the device already from the second step on
    original = {name: getattr(module, name) for name in tables}
    try:
        for name in kernels:
            setattr(module, name, launches.stand_in(name))
        for name in tables:
            setattr(module, name, lambda numbers, device: torch.empty(0, dtype=torch.int64))
        with Counted() as counted:
            case.kernels(module, *inputs)
    finally:
        for name, value in (kernels | original).items():
            setattr(module, name, value)
    return len(launches) + counted.launches, counted.bytes


def predicted(gpu: str, bytes_moved: float, operations: float, launches: int) -> float:
    bandwidth, rate = GPUS[gpu]
    return max(bytes_moved / bandwidth, operations / rate) + launches * LAUNCH


BACKENDS = ("triton", "cuda")


def error_of(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, relative to a result's largest element."""
    return max(((ours.double() - x).abs().max() / x.abs().max()).item() for ours, x in zip(results, truth, strict=True))


def kernel_seconds(run: Callable, rounds: int = 30) -> float:
    """Of a step's kernels: the median of replays of a CUDA graph, L2 flushed before each."""
    replay = gpu_steps.captured(run)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def called_seconds(runs: dict[str, Callable], rounds: int = 9, seconds: float = 0.02) -> dict[str, float]:
    """Of steps as Python calls them, back to back; medians of interleaved rounds."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            torch.cuda.synchronize()
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                run()
                count += 1
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(found) for name, found in times.items()}


def measured(case: Case, compiled: bool) -> dict:
    """{"kernels": {candidate: seconds}, "called": ..., "error": ..., "failed": {candidate: why}}"""
    import fastgan
    from fastgan import backends

    inputs = case.inputs("cuda")
    truth = step_of(case.eager, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])()
    found = {"kernels": {}, "called": {}, "error": {}, "failed": {}}
    op = {"spectral_norm": "spectral_norm_multi"}.get(case.op, case.op)
    candidates = {name: case.fastgan for name in BACKENDS if backends.problem(name, op, "cuda") is None}
    candidates["eager"] = case.eager
    if compiled:
        candidates["compile"] = torch.compile(case.eager, dynamic=False)

    def served(name):
        return fastgan.use_backend(name) if name in BACKENDS else contextlib.nullcontext()

    runs = {}
    for name, function in candidates.items():
        try:
            with served(name):
                run = step_of(function, inputs)
                found["error"][name] = error = error_of(run(), truth)
                if name in BACKENDS and not error < 1e-4:
                    raise AssertionError(f"relative error {error:.2g}")
                found["kernels"][name] = kernel_seconds(run)
            runs[name] = run
        except Exception as error:  # the others are still worth measuring
            found["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    del truth
    for name in [name for name in runs if name in BACKENDS]:  # switching backends is no part of a call
        with served(name):
            found["called"] |= called_seconds({name: runs.pop(name)})
    found["called"] |= called_seconds(runs)
    return found


def measure_all(compiled: bool) -> dict:
    import triton

    from fastgan import measure

    size = 1 << 30
    source, target = torch.ones(2, size // 4, device="cuda")
    copy = 2 * size / kernel_seconds(lambda: target.copy_(source))
    rows = []
    for case in cases():
        row = {"op": case.op, "shape": case.shape, **measured(case, compiled and case.op != "spectral_norm")}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
    torch.backends.cudnn.benchmark = True
    machine = measure.machine() | {"triton": triton.__version__, "copy_bytes_per_second": copy, "cudnn_benchmark": True}
    steps = [gpu_steps.measure(*size, mode) for size in gpu_steps.SIZES for mode in gpu_steps.MODES]
    return {"machine": machine, "cases": rows, "steps": steps}


def table() -> str:
    columns = [f"{name}, fastgan / eager" for name in GPUS]
    head = ["operator", "shape", "MB", "MB, eager", "Mop", "launches", "launches, eager", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case in cases():
        launches, around = kernel_counts(case)
        eager_launches, eager_bytes = eager_counts(case)
        total = case.bytes + around
        row = [case.op, case.shape, f"{total / 1e6:.2f}", f"{eager_bytes / 1e6:.2f}", f"{case.operations / 1e6:.1f}"]
        row += [str(launches), str(eager_launches)]
        for name in GPUS:
            ours = predicted(name, total, case.operations, launches)
            eager = predicted(name, eager_bytes, case.operations, eager_launches)
            row.append(f"{ours * 1e6:.0f} / {eager * 1e6:.0f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def measured_table(results: dict) -> str:
    machine, names = results["machine"], [*BACKENDS, "eager", "compile"]
    head = ["operator", "shape", *(f"{kind}: {name}" for kind in ("kernels", "called") for name in names)]
    lines = [
        f"**{machine['gpu']}**, torch {machine['torch']}, Triton {machine['triton']}; a copy of 1 GiB moves "
        f"{machine['copy_bytes_per_second'] / 1e12:.2f} TB/s. Operators, microseconds:",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in results["cases"]:
        cells = [f"{row[kind][n] * 1e6:.0f}" if n in row[kind] else "–" for kind in ("kernels", "called") for n in names]
        lines.append("| " + " | ".join([row["op"], row["shape"], *cells]) + " |")
    search = "on" if machine["cudnn_benchmark"] else "off"
    lines += ["", f"Critic steps, `torch.backends.cudnn.benchmark` {search}:", ""]
    return "\n".join([*lines, *gpu_steps.table(results["steps"])]) + "\n"


RESULTS = Path(__file__).parent / "results" / "gpu"
#: marker in a page -> what stands between it and its end
PARTS = {
    "gpu table": table,
    "gpu measured": lambda: "\n".join(measured_table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, metavar="FILE.json", help="measure here and write the results")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too, but for spectral norm: minutes")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="a Markdown file with the tables' markers in it")
    options = parser.parse_args()
    if options.measure:
        if not torch.cuda.is_available():
            print("benchmarks.gpu: --measure needs a GPU, and this torch sees none", file=sys.stderr)
            return 2
        results = measure_all(options.compile)
        options.measure.write_text(json.dumps(results, indent=1) + "\n")
        print(measured_table(results))
        return 1 if any(row["failed"] for row in results["cases"] + results["steps"]) else 0
    for name, text in ((name, make()) for name, make in PARTS.items()):
        print(text)
        if options.write:
            begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
            before, _, rest = options.write.read_text().partition(begin)
            options.write.write_text(before + begin + text + end + rest.partition(end)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
