"""Accelerated critics with penalties of the user's own in 2 gloo processes, against plain ones in one process."""

import contextlib
import itertools

import pytest
import reference
import torch
import torch.nn.functional as F
from ranks import WORLD, on_ranks
from test_accelerate import MinibatchStdLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, spectral_norm

import fastgan


class Critic(nn.Module):
    """Activations and pooling as functions; ``norm`` wraps each layer; ``stddev`` over groups of 4."""

    def __init__(self, norm=lambda layer: layer, stddev=False):
        super().__init__()
        self.a, self.b = norm(nn.Conv2d(3, 6, 3, 1, 1)), norm(nn.Conv2d(6, 4, 3, 1, 1))
        self.std = MinibatchStdLayer(4) if stddev else None
        self.out = norm(nn.Linear((4 + stddev) * 16, 1))

    def forward(self, x):
        x = F.avg_pool2d(F.leaky_relu(self.b(F.relu(self.a(x))), 0.2), 2)
        return self.out((self.std(x) if self.std is not None else x).flatten(1))


CRITICS = {
    "plain": Critic,
    "hook": lambda: Critic(spectral_norm),
    "parametrization": lambda: Critic(parametrizations.spectral_norm),
    # rank r has rows r, r + 2, ...: StyleGAN's groups of 4 of 8 samples
    "stddev": lambda: Critic(stddev=True),
}


def make(name):
    torch.manual_seed(0)
    return CRITICS[name]().double()


def batches(rank=None, step=0):
    both = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return both if rank is None else both[:, rank::WORLD]


def gradient(critic, x):
    x = x.detach().requires_grad_()
    scores = critic(x)
    (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return scores, g


def wgan_gp(critic, real, fake):
    penalty = ((gradient(critic, torch.lerp(fake, real, 0.3))[1].flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


def r1_r2(critic, real, fake):
    (a, g), (b, h) = gradient(critic, real), gradient(critic, fake)
    return F.softplus(b - a).mean() + 0.5 * (g.square().flatten(1).sum(1) + h.square().flatten(1).sum(1)).mean()


def assert_same(model, alone):
    for (name, ours), theirs in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def _under_ddp(rank):
    for name, loss, broadcast in itertools.product(CRITICS, (wgan_gp, r1_r2), (True, False)):
        alone, model = make(name), make(name)
        assert fastgan.accelerate(model).replaced
        if rank == 1 and broadcast:  # repaired by the first broadcast
            for buffer in model.buffers():
                buffer.neg_()
        wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
        optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (alone, model)]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(alone, *batches(step=step)).backward()
            loss(wrapped, *batches(rank, step)).backward()
            assert [p.grad is None for p in model.parameters()] == [p.grad is None for p in alone.parameters()]
            assert reference.error(reference.grads(model), reference.grads(alone)) <= 1e-9, (name, loss, step)
            for optimizer in optimizers:
                optimizer.step()
        assert_same(model, alone)


def _accumulation(rank):
    for name in ("plain", "parametrization"):
        alone, model = make(name), make(name)
        fastgan.accelerate(model)
        wrapped = DistributedDataParallel(model)
        for step in range(2):
            with wrapped.no_sync() if step == 0 else contextlib.nullcontext():
                wgan_gp(wrapped, *batches(rank, step)).backward()
            wgan_gp(alone, *batches(step=step)).backward()
        assert reference.error(reference.grads(model), reference.grads(alone)) <= 1e-9


def _wrapped_before(rank):
    model = make("hook")
    wrapped = DistributedDataParallel(model)
    report = fastgan.accelerate(wrapped, verify=True, example_inputs=batches(rank)[0])
    assert {"module.a", "module.b", "module.out"} <= {r.name for r in report.replaced} and not report.skipped
    alone = make("hook")
    wgan_gp(alone, *batches()).backward()
    wgan_gp(wrapped, *batches(rank)).backward()
    assert reference.error(reference.grads(model), reference.grads(alone)) <= 1e-9
    found = [f.what for f in fastgan.audit(wrapped, batches(rank)[0])]
    assert found == ["DDP broadcasts buffers"]


def _fsdp(rank):
    """Losses without penalties as in one process; a penalty is refused by PyTorch itself, and by fastgan with a way out."""
    for name, before in itertools.product(("hook", "parametrization"), (True, False)):
        alone, model = make(name), make(name)
        if before:
            fastgan.accelerate(model)
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (model.a, model.b, model.out):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not before:
            fastgan.accelerate(model)
        optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (alone, model)]
        for step in range(2):
            for m, rows, optimizer in ((alone, None, optimizers[0]), (model, rank, optimizers[1])):
                real, fake = batches(rows, step)
                optimizer.zero_grad()
                ((1 - m(real)).relu().mean() + (1 + m(fake)).relu().mean()).backward()
                optimizer.step()
        for (key, ours), theirs in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
            full = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
            torch.testing.assert_close(full, theirs, msg=lambda text, key=key: f"{key}: {text}")
        with pytest.raises(ValueError, match=r"sharded by FSDP.*DistributedDataParallel"):
            fastgan.gradient_penalty(model, *batches(rank))
        assert "sharded critic" in [f.what for f in fastgan.audit(model)]


def _further(rank):
    """One start of processes for both, which is what takes the time."""
    _accumulation(rank)
    _wrapped_before(rank)


@pytest.mark.parametrize("target", [_under_ddp, _further, _fsdp], ids=lambda f: f.__name__)
def test_two_processes(target):
    on_ranks(target)
