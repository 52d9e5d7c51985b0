"""Handing finished gradients to autograd, so that accumulation, hooks, DDP, clipping and GradScaler see an ordinary
backward."""

import contextlib

import torch

_reads = True  # may values be read now? Process-wide: backward runs in threads of its own


@contextlib.contextmanager
def unread():
    """Inside, gradients are delivered without reading a value, as in a CUDA graph: where a check fails, they are NaN."""
    global _reads
    before, _reads = _reads, False
    try:
        yield
    finally:
        _reads = before


def _refuse_again(spent):
    if spent:
        raise RuntimeError(
            "these gradients were already delivered: they are computed once, so backward() works once; "
            'call the step again, or use method="double_backward" where a differentiable penalty is needed'
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the delivered gradients are finished numbers and cannot be differentiated again; "
            'use the penalty functions with method="double_backward"'
        )


class Delivery:
    """Gradients by leaf, handed out once. ``checks``: (bool tensor, message) pairs read just before delivery, so that a
    device need not be waited for earlier."""

    def __init__(self, gradients, leaves, checks=()):
        self.gradients, self.leaves, self.checks = gradients, leaves, list(checks)
        self.spent = False

    def attach(self, value):
        """A scalar with this value whose backward delivers the gradients, times the incoming gradient."""
        wanted = [leaf for key, leaf in self.leaves.items() if key in self.gradients]
        return _Deliver.apply(value.detach(), self, *wanted)

    def hand_out(self, leaves, factor):
        _refuse_again(self.spent)
        unreadable = not _reads or (factor.is_cuda and torch.cuda.is_current_stream_capturing())
        if self.checks and unreadable:
            fine = torch.stack([flag for flag, _ in self.checks]).all()
            factor = torch.where(fine, factor, torch.nan)
        else:
            for flag, message in self.checks:
                if not bool(flag):
                    raise RuntimeError(message)
        self.spent = True
        plain = factor.device.type == "cpu" and float(factor) == 1.0
        out = []
        for leaf in leaves:
            grad = self.gradients.pop(id(leaf))
            grad = grad if plain else grad * factor.to(grad.dtype)
            # DDP and fused optimizers want the layout of the parameter
            out.append(grad.to(leaf.dtype).reshape(leaf.shape).contiguous(memory_format=_memory_format(leaf)))
        return out


def _memory_format(leaf):
    if leaf.dim() == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, delivery, *leaves):
        ctx.delivery, ctx.leaves = delivery, leaves
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, *ctx.delivery.hand_out(ctx.leaves, grad_output)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.spent = False
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        _refuse_again(ctx.spent)
        ctx.spent = True
        return grad_output


def once(value):
    """``value``, whose own graph delivers the gradients, under the rules of :class:`Delivery`: once, and for good."""
    return _Once.apply(value)
