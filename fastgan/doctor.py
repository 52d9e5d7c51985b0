"""``fastgan doctor``: versions, what was built, and which backend serves each operator on each device, with reasons."""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
from pathlib import Path

import torch

import fastgan
from fastgan import backends, measure
from fastgan.ops import references


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict:
    extension = backends.extension
    report = {"path": str(extension.path) if extension.path else None, "loaded": extension.loaded, "problem": extension.problem}
    report["record"] = extension.record
    if extension.loaded:
        from fastgan import _C

        report["isa"] = _C.isa()
    return report


def examine() -> dict:
    """Everything the command shows, as plain data."""
    operators = {
        op: {
            device: {
                "serving": backends.serving(op, device),
                "not_serving": {
                    name: why for name in backends.NAMES if (why := backends.problem(name, op, device)) is not None
                },
            }
            for device in backends.DEVICES
        }
        for op in references
    }
    return {
        "fastgan": {"version": fastgan.__version__, "path": str(Path(fastgan.__file__).parent)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in ("triton", "numpy", "ninja")},
        },
        "tools": {"c++": shutil.which("c++"), "nvcc": shutil.which("nvcc")},
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "machine": measure.machine(),
        "extension": _extension(),
        "chosen": backends._chosen,
        "operators": operators,
    }


def _print(report: dict) -> None:
    extension = report["extension"]
    print(f"fastgan {report['fastgan']['version']}  ({report['fastgan']['path']})")
    print("versions    " + ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items()))
    print("build tools " + ", ".join(f"{name}: {path or 'absent'}" for name, path in report["tools"].items()))
    print(f"GPUs        {', '.join(report['gpu']) or 'none'}")
    cpu = report["machine"]
    print(f"CPU         {cpu['processor']}, {cpu['instructions']}, {cpu['threads']} threads, allocator {cpu['allocator']}")
    if extension["loaded"]:
        built = ", ".join(f"{key} {value}" for key, value in extension["record"].items())
        print(f"fastgan._C  loaded, CPU kernels for {extension['isa']} ({built})")
    else:
        print(f"fastgan._C  not used: {extension['problem']}")
    if report["chosen"]:
        print(f"backend     {report['chosen']}, named by FASTGAN_BACKEND or use_backend")
    print()
    width = max(len(op) for op in report["operators"])
    print(f"{'operator':{width}}  {'cpu':10} cuda")
    for op, devices in report["operators"].items():
        print(f"{op:{width}}  {devices['cpu']['serving']:10} {devices['cuda']['serving']}")
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for op, devices in report["operators"].items():
        for device, state in devices.items():
            for backend, why in state["not_serving"].items():
                reasons.setdefault((backend, device, why), []).append(op)
    print("\nwhat does not serve, and why")
    for (backend, device, why), ops in reasons.items():
        which = "all" if len(ops) == len(report["operators"]) else ", ".join(ops)
        print(f"  {backend} on {device} ({which}): {why}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastgan doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--allocator",
        action="store_true",
        help="measure C allocator and thread settings on a training step, and print the lines to set (a minute or so)",
    )
    arguments = parser.parse_args(argv)
    if arguments.allocator:
        from fastgan import allocator

        report, show = allocator.examine(), allocator.show
    else:
        report, show = examine(), _print
    if arguments.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        show(report)
    return 0
