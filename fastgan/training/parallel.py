"""Several processes, one per device, as ``torchrun`` starts them.

``ddp``: every process has all networks, and the gradients of a player are averaged between backward and its optimizer's step,
in one transfer. That asks nothing of how a loss calls its networks: several times, in part, by other methods than forward, with
derivatives of derivatives. ``fsdp``: networks that no critic's player trains are sharded by PyTorch's ``fully_shard``, with
their gradients, optimizer states and averages. Of critics the optimizer's work and states are shared out (Rajbhandari et al.,
"ZeRO", 2020, stage 1): their weights stay whole, for ``fully_shard`` frees them after a backward pass, and a critic's step
takes a second one; besides, every player's turn needs them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """This process among ``world`` of them."""

    rank: int = 0
    world: int = 1
    mode: str = "ddp"
    device: str = "cpu"  # its type

    def shard(self, module: nn.Module) -> None:
        """Under fsdp ``module`` keeps only this process's part of its parameters, between forward and backward passes."""
        if self.mode != "fsdp" or next(module.parameters(), None) is None:
            return
        if isinstance(module, nn.ModuleList | nn.ModuleDict):  # no forward to hook into
            for part in module.children():
                self.shard(part)
            return
        from torch.distributed.fsdp import fully_shard

        # resharded after a forward without backward, too, which averages and the critics' turns are full of
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    @cached_property
    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device, (self.world,))

    def parts(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Under fsdp this process's parts of whole parameters, for an optimizer to work on; else the parameters."""
        if self.mode != "fsdp":
            return parameters
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        return [
            nn.Parameter(distribute_tensor(p.detach(), self.mesh, [Shard(0) if p.dim() else Replicate()], src_data_rank=None))
            for p in parameters
        ]

    def any(self, here: bool) -> bool:
        """Whether it is so in any process. On the CPU, so that no device is waited for."""
        if self.world == 1:
            return here
        flag = torch.tensor(float(here))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become their means over all processes. Where only some processes have one, the others count as zero."""
        if self.world == 1:
            return
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if not is_sharded(parameter):  # those are averaged in backward
                groups.setdefault(parameter.dtype, []).append(parameter)
        for group in groups.values():
            missing = [parameter.grad is None for parameter in group]
            seen = torch.tensor(missing, device=group[0].device).logical_not_()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([seen.to(group[0].dtype), *(grad.flatten() for grad in grads)])
            distributed.all_reduce(flat)
            seen, *means = flat.div_(self.world).split([len(group), *(p.numel() for p in group)])
            if any(missing):  # only then: looking costs a wait for the device
                missing = seen.eq(0).tolist()
            for parameter, mean, nowhere in zip(group, means, missing, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter))
                elif not nowhere:
                    parameter.grad = mean.view_as(parameter).clone()

    @torch.no_grad()
    def share_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Buffers become those of the first process: batch statistics differ, each process having seen other samples."""
        if self.world == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in {id(b): b for module in modules for b in module.buffers() if b.numel()}.values():
            groups.setdefault(buffer.dtype, []).append(buffer)
        for group in groups.values():
            flat = torch.cat([buffer.flatten() for buffer in group])
            distributed.broadcast(flat, 0)
            if self.rank:
                for buffer, value in zip(group, flat.split([b.numel() for b in group]), strict=True):
                    buffer.copy_(value.view_as(buffer))

    def gather(self, value) -> list:
        """``value`` of each process, in order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def first(self, function, *arguments):
        """What ``function(*arguments)`` gives the first process, which alone calls it; its ValueError or OSError is raised in
        all of them."""
        if self.world == 1:
            return function(*arguments)
        outcome = [None, None]
        if not self.rank:
            try:
                outcome[0] = function(*arguments)
            except (ValueError, OSError) as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


ALONE = Processes()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; torch.distributed.tensor need not be imported to know


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; every process has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which all processes have whole, sharded as ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def cut(parameters: list[nn.Parameter], parts: list[nn.Parameter]) -> None:
    """Parameters that have changed to what an optimizer works on, as :meth:`Processes.parts` made it."""
    for parameter, own in zip(parameters, parts, strict=True):
        if own is not parameter:
            own.copy_(part(parameter, own))


def hand_over(parameters: list[nn.Parameter], parts: list[nn.Parameter]) -> None:
    """Their gradients to it."""
    for parameter, own in zip(parameters, parts, strict=True):
        if own is not parameter:
            own.grad = None if parameter.grad is None else part(parameter.grad, own)


@torch.no_grad()
def hand_back(parameters: list[nn.Parameter], parts: list[nn.Parameter]) -> None:
    """And what it made of its parts to the parameters."""
    for parameter, own in zip(parameters, parts, strict=True):
        if own is not parameter:
            parameter.copy_(whole(own))


def start(device: torch.device, mode: str = "ddp") -> Processes:
    """Join the processes that torchrun started, if it did; each on its own GPU where ``device`` is CUDA."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if mode == "fsdp":
            raise ValueError(
                "--parallel fsdp shards networks over several processes, and this is one: "
                "torchrun --nproc-per-node N -m fastgan train RECIPE --parallel fsdp"
            )
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size(), mode, device.type)


def stop() -> None:
    """Leave them."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
