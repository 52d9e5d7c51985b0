"""How much memory there is, and keeping a process to a part of it: nothing here may take the machine down."""

import contextlib
import os
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

_CGROUPS = Path("/sys/fs/cgroup")


def _cgroup_free() -> list[int]:
    """What each control group above this process leaves, in bytes (versions 1 and 2)."""
    free = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, most, used = _CGROUPS, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, most, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = root / path.lstrip("/")
            for here in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    free.append(int((here / most).read_text()) - int((here / used).read_text()))
                if here == root:
                    break
    return free


def available_memory() -> int | None:
    """Bytes that this process could still take: of the machine, and of the control groups it is in; None: can't tell."""
    found = _cgroup_free()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    return max(0, min(found)) if found else None


def confine(extra: int, cuda: bool = False) -> None:
    """From here on this process may take ``extra`` bytes more; allocations beyond that fail, with an exception.

    Should the machine run out of memory all the same, the kernel is told to end this process before any other.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if cuda:  # its address space is not its memory
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + extra) / total))
        return
    if resource is None or not os.path.exists("/proc/self/statm"):
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit, hard = pages * resource.getpagesize() + extra, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail? Libraries say so in various ways."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "can't allocate", "cannot allocate", "bad_alloc", "out of memory", "failed to allocate")
    words += ("could not create a memory", "could not create a primitive", "could not execute a primitive")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in words)
