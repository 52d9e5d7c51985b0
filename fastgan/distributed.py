"""Minibatches that span ranks: gather samples of every rank, with gradients of any order."""

import torch
import torch.distributed as dist
from torch import Tensor


def _resolve(group, what: str):
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{what}: group was given but torch.distributed is not initialised; call torch.distributed.init_process_group "
            f"first (torchrun sets its environment), or leave group out for the minibatch of this process alone"
        )
    return dist.group.WORLD if group == "world" else group


class _Gather(torch.autograd.Function):
    """(B_r, ...) on each rank -> (sum B, ...) on all. Its transpose sums what the ranks send back: each other's derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: tuple[int, ...], group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        # Equal lengths are what every torch.distributed backend can gather.
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ScatterSum.apply(grad, ctx.counts, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    """(sum B, ...) on each rank -> this rank's rows of the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: tuple[int, ...], group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split(counts)[dist.get_rank(group)]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gather.apply(grad, ctx.counts, ctx.group), None, None


def gather_batch(x: Tensor, group, what: str) -> tuple[Tensor, tuple[int, ...]]:
    """All ranks' samples in rank order, and how many each rank has.

    Args:
        x: (B, ...); B may differ between ranks, the rest may not.
        group: process group, or ``"world"``.
        what: names function and argument in errors.

    The backward pass sums over ranks what each rank's loss sends to these samples: with the usual averaging of parameter
    gradients (DistributedDataParallel) and a loss that is a mean over equal batches, parameters get the gradient of one
    process with the whole batch.
    """
    group = _resolve(group, what)
    world = dist.get_world_size(group)
    shape = torch.tensor([x.dim(), *x.shape], device=x.device)
    rank_shape = torch.zeros(16, dtype=torch.long, device=x.device)
    rank_shape[: shape.numel()] = shape
    shapes = [torch.empty_like(rank_shape) for _ in range(world)]
    dist.all_gather(shapes, rank_shape, group=group)
    shapes = [tuple(s[1 : 1 + int(s[0])].tolist()) for s in shapes]
    if len({s[1:] for s in shapes}) > 1:  # every rank sees the same list, so every rank raises and none is left waiting
        raise RuntimeError(f"{what}: ranks disagree on the shape of a sample, theirs are {shapes}; only the batch may differ")
    counts = tuple(s[0] for s in shapes)
    return _Gather.apply(x, counts, group), counts


def rows_of_this_rank(x: Tensor, counts: tuple[int, ...], group) -> Tensor:
    """Inverse of ``gather_batch``'s concatenation: the rows of ``x`` (sum B, ...) that belong to this rank's samples."""
    return x.split(counts)[dist.get_rank(_resolve(group, "rows_of_this_rank"))]
