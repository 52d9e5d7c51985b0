"""Several processes, one per device, as ``torchrun`` starts them."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import pack_modules


@dataclass(frozen=True)
class Processes:
    """This process among ``world`` of them."""

    rank: int = 0
    world: int = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` for its own player's turn: backward averages its gradients over all processes."""
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def whole(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """All parameters and buffers, by ``network.key``."""
        return pack_modules(modules)

    def gather(self, value) -> list:
        """``value`` of each process, in order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()


ALONE = Processes()


def start(device: torch.device) -> Processes:
    """Join the processes that torchrun started, if it did; each on its own GPU where ``device`` is CUDA."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size())
