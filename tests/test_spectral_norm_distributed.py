"""Spectral norm on several ranks: 2 gloo processes."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastgan
from fastgan.nn.utils import spectral_norm as hook

FORMS = {"parametrization": fastgan.spectral_norm, "hook": hook}


def critic(form):
    torch.manual_seed(0)
    wrap = FORMS[form]
    return nn.Sequential(wrap(nn.Linear(6, 12)), nn.LeakyReLU(0.2), wrap(nn.Linear(12, 8)), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def batches(rank=None):
    """Real and fake of all ranks, or of one."""
    every = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return every if rank is None else every.view(2, 2, 4, 6)[:, rank]


def steps(model, real, fake, freeze, count=3):
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(count):
        optimiser.zero_grad()
        loss = (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()  # two forwards, then a backward
        with freeze():
            loss = loss + model(real + fake).square().mean()  # an extra pass
        loss.backward()
        optimiser.step()


def _same_on_all_ranks(model):
    for name, value in model.state_dict().items():
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        assert all(torch.equal(parts[0], part) for part in parts), name


def _assert_equal(model, expected):
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        full = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        torch.testing.assert_close(full, theirs, msg=lambda text, name=name: f"{name}: {text}")


def _under_ddp(rank):
    for form, broadcast, refresh in itertools.product(FORMS, (True, False), (None, "per_forward", "per_step")):
        alone, model = critic(form).double(), critic(form).double()
        groups = [fastgan.SpectralNormGroup(m, refresh=refresh) if refresh else None for m in (alone, model)]
        freezes = [group.freeze if group else contextlib.nullcontext for group in groups]
        steps(alone, *batches(), freezes[0])
        if rank == 1 and broadcast:  # DDP repairs it; without broadcasts buffers have to start equal
            for buffer in model.buffers():
                buffer.neg_()
        steps(DistributedDataParallel(model, broadcast_buffers=broadcast), *batches(rank), freezes[1])
        _same_on_all_ranks(model)
        _assert_equal(model, alone)


def test_ranks_stay_identical_under_ddp():
    """And equal to one process with the whole batch; one start of processes for all combinations, which takes the time."""
    on_ranks(_under_ddp)


def _under_fsdp(rank):
    for form in FORMS:
        alone, model = critic(form).double(), critic(form).double()
        steps(alone, *batches(), contextlib.nullcontext)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        steps(model, *batches(rank), contextlib.nullcontext)
        _assert_equal(model, alone)


def test_layers_sharded_by_fsdp2():
    on_ranks(_under_fsdp)


def _group_under_fsdp(rank):
    model = critic("parametrization")
    group = fastgan.SpectralNormGroup(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    with pytest.raises(RuntimeError, match="sharded over ranks"):
        model(torch.randn(2, 6))
    group.remove()
    assert model(torch.randn(2, 6)).shape == (2, 1)


def test_a_group_of_sharded_weights_says_why_not():
    on_ranks(_group_under_fsdp)
