"""Counting the arithmetic of convolutions and matrix products.

torch's own counter overcounts the weight gradient of grouped convolutions, so convolutions are counted here: forward
and each requested gradient cost 2 * output elements * weight elements per output channel.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _convolution(weight, small_side, transposed):
    # small_side: elements of the output (of the input for a transposed convolution)
    return 2 * small_side * weight.numel() // weight.shape[0]


class FlopCounter(TorchDispatchMode):
    """``with FlopCounter() as count: ...`` then ``count.total`` (and ``count.by_op``)."""

    def __init__(self):
        super().__init__()
        self.by_op = {}

    @property
    def total(self):
        return sum(self.by_op.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, n = func._overloadpacket, 0
        if name is aten.convolution:
            x, w, transposed = args[0], args[1], args[6]
            n = _convolution(w, x.numel() if transposed else out.numel(), transposed)
        elif name is aten.convolution_backward:
            grad, x, w, transposed, mask = args[0], args[1], args[2], args[7], args[10]
            n = _convolution(w, x.numel() if transposed else grad.numel(), transposed) * (mask[0] + mask[1])
        elif name is aten.slow_conv_transpose2d:
            n = _convolution(args[1], args[0].numel(), True)
        elif name is aten.mm:
            n = 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name is aten.addmm:
            n = 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif name in (aten.bmm, aten.baddbmm):
            a, b = args[-2:] if name is aten.bmm else args[1:3]
            n = 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        elif name is aten.mv:
            n = 2 * args[0].numel()
        if n:
            self.by_op[name] = self.by_op.get(name, 0) + n
        return out


def flops(function):
    """Operations counted while running function()."""
    with FlopCounter() as count:
        function()
    return count.total
