"""Critics wrapped for several processes."""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel


def refuse_sharded(critic):
    """Raise ValueError for a critic whose parameters exist only while its own forward and backward run (FSDP)."""
    if (
        not torch.distributed.is_available()
        or not torch.distributed.is_initialized()
        or not isinstance(critic, torch.nn.Module)
    ):
        return  # sharding needs a process group
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in critic.modules()):
        raise ValueError(
            "the critic is sharded by FSDP, which frees parameters after each pass and cannot be differentiated twice, in "
            "eager PyTorch either; replicate the critic with DistributedDataParallel, and shard the generator alone"
        )


class Replica:
    """A critic that may be wrapped in DistributedDataParallel: forwards run on the inner module, with buffers broadcast
    before each one as DDP does, and the reducer is prepared once, for the finished loss.

    DDP prepares its reducer at every forward for the backward of that forward. A step has two or three forwards and one
    delivery, and only the delivered loss knows which parameters will get gradients.
    """

    def __init__(self, critic):
        self.ddp = critic if isinstance(critic, DistributedDataParallel) else None
        self.module = critic if self.ddp is None else critic.module
        if self.ddp is not None and self.ddp.mixed_precision is not None:
            raise ValueError("DDP's mixed_precision casts inside its own forward: use torch.autocast around the step instead")

    def moves_buffers(self):
        """Does a forward broadcast buffers?"""
        return self.ddp is not None and self.ddp.broadcast_buffers and bool(self.ddp.modules_buffers)

    @contextlib.contextmanager
    def forward(self):
        """Around each forward of the inner module."""
        if self.ddp is None:
            yield
            return
        if self.ddp._check_sync_bufs_pre_fwd():
            self.ddp._sync_buffers()
        yield
        if self.ddp._check_sync_bufs_post_fwd():
            self.ddp._sync_buffers()
        # inside the user's no_sync(), DDP leaves buffers alone after the first forward
        self.ddp.require_forward_param_sync = torch.is_grad_enabled() and self.ddp.require_backward_grad_sync

    def finish(self, loss):
        """The loss, whose backward will average the gradients over processes."""
        if self.ddp is None or not (torch.is_grad_enabled() and self.ddp.require_backward_grad_sync):
            return loss
        self.ddp.require_forward_param_sync = False  # buffers have been moved
        self.ddp._pre_forward()
        return self.ddp._post_forward(loss)
