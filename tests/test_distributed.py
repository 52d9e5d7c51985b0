"""Minibatches across ranks: 2 gloo processes against one process with the whole batch."""

import functools

import pytest
import torch
from ranks import assert_as_one_process, on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastgan
from fastgan.nn import MinibatchDiscrimination


def whole_batch(b=10):
    return torch.randn(b, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4


def _values_and_derivatives(rank, counts):
    discriminate = functools.partial(fastgan.minibatch_discrimination, self_term=False)
    assert_as_one_process(rank, counts, whole_batch(sum(counts)), lambda x, group: discriminate(x, group=group))


@pytest.mark.parametrize("counts", [(5, 5), (7, 3), (10, 0)])
def test_values_gradients_and_second_derivatives(counts):
    on_ranks(_values_and_derivatives, counts)


def _critic(group):
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(8, 4, 3, init_std=0.3, group=group)
    return nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), layer, nn.Linear(12, 1)).double()


def _wgan_gp_under_ddp(rank):
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(critic, batch):
        batch = batch.clone().requires_grad_()
        score = critic(batch).square()
        (g,) = torch.autograd.grad(score.sum(), batch, create_graph=True)
        return score.mean() + ((g.norm(dim=1) - 1) ** 2).mean()

    alone = _critic(None)
    batch = x.clone().requires_grad_()
    score = alone(batch).square()
    (g,) = torch.autograd.grad(score.sum(), batch, create_graph=True)
    (score.mean() + ((g.norm(dim=1) - 1) ** 2).mean()).backward()
    critic = DistributedDataParallel(_critic("world"))
    loss(critic, x.split(4)[rank]).backward()
    for ours, expected in zip(critic.module.parameters(), alone.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad)


def test_ddp_equals_one_process_with_the_whole_batch():
    on_ranks(_wgan_gp_under_ddp)


def _ranks_disagree(rank):
    with pytest.raises(
        RuntimeError, match=r"m: ranks disagree on the shape of a sample, theirs are \[\(2, 3, 4\), \(2, 3, 5\)\]"
    ):
        fastgan.minibatch_discrimination(torch.zeros(2, 3, 4 + rank), group="world")


def test_disagreeing_ranks_raise_everywhere():
    on_ranks(_ranks_disagree)
