"""Counting memory: the most bytes of tensors alive at once while something runs."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class MemoryCounter(TorchDispatchMode):
    """``with MemoryCounter() as count: ...`` then ``count.peak``: bytes of storages made inside, looked at after each
    operation. Scratch space inside of kernels does not count, nor does what was there before."""

    def __init__(self):
        super().__init__()
        self.older, self.alive, self.peak = set(), {}, 0  # storages by address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        # what comes in and was not made here was there before; kept alive, so that its address is not given out again
        self.older |= {s for s in storages((args, kwargs)) if s._cdata not in self.alive}
        out = func(*args, **(kwargs or {}))
        known = {s._cdata for s in self.older}
        self.alive |= {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in storages(out) if s._cdata not in known}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


def peak_bytes(function):
    """Of ``function()``, results included."""
    with MemoryCounter() as count:
        function()
    return count.peak
