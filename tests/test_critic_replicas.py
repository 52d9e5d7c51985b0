"""The critic step on a DDP-wrapped critic, in two gloo processes, against the textbook step on a DDP-wrapped critic."""

import copy

import critics
import pytest
import reference
import torch
import torch.nn as nn
from ranks import on_ranks
from test_critic_step import GP, R12, textbook
from torch.nn.parallel import DistributedDataParallel

import fastgan

torch.set_num_threads(1)


class Drifting(critics.SharedConv):
    """Its buffer moves at every forward, by what this process sees, and shifts the next input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.only_reals = nn.Parameter(torch.ones(()))

    def forward(self, x, reals=False):
        y = super().forward(x + self.shift)
        self.shift.mul_(0.5).add_(x.detach().mean())
        return y * self.only_reals if reals else y


class Counting:
    """A reducer that counts its preparations."""

    def __init__(self, reducer):
        self.reducer, self.forwards, self.backwards = reducer, 0, 0

    def prepare_for_forward(self):
        self.forwards += 1
        self.reducer.prepare_for_forward()

    def prepare_for_backward(self, outputs):
        self.backwards += 1
        self.reducer.prepare_for_backward(outputs)

    def __getattr__(self, name):
        return getattr(self.reducer, name)


def batches(rank):
    torch.manual_seed(10)
    rows = slice(4 * rank, 4 * rank + 4)
    return [t[rows] for t in torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)]


def make(critic, **options):
    torch.manual_seed(0)
    inner = critic().double()
    return inner, DistributedDataParallel(inner, **options)


def same_as_textbook(rank, critic, case, arguments=(), steps=3, compiled=False, **options):
    real, fake = batches(rank)
    ours, wrapped = make(critic, **options)
    eager, eager_wrapped = make(critic, **options)
    wrapped.reducer = Counting(wrapped.reducer)
    for k in range(steps):
        ours.zero_grad()
        eager.zero_grad()
        kw = {"alpha": 0.25, "real_args": arguments, **case}
        step = fastgan.critic_step(wrapped, real, fake, compile=compiled, **kw)
        step.loss.backward()
        textbook(eager_wrapped, real, fake, **kw)[0].backward()
        assert wrapped.reducer.forwards == wrapped.reducer.backwards == k + 1
        assert reference.error(reference.grads(ours), reference.grads(eager)) <= 1e-12
        for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
            assert torch.equal(a, b)
        first = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        for g in first:
            torch.distributed.broadcast(g, 0)
        mine = [p.grad for p in ours.parameters() if p.grad is not None]
        assert all(torch.equal(g, m) for g, m in zip(first, mine, strict=True)), "processes disagree"
    return step


def plain(rank):
    for case in (R12, GP, dict(R12, gradient_penalty=2.0)):
        assert same_as_textbook(rank, critics.SharedConv, case).method == "fused"


def buffers(rank):
    same_as_textbook(rank, Drifting, R12, arguments=(True,))
    same_as_textbook(rank, lambda: nn.Sequential(critics.conv(3, 4), nn.BatchNorm2d(4), critics.head(4)), R12)
    same_as_textbook(rank, Drifting, R12, arguments=(True,), broadcast_buffers=False)


def unused(rank):
    class Spare(critics.SharedConv):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    same_as_textbook(rank, Spare, R12, find_unused_parameters=True)


def static_graph(rank):
    # textbook double backward is off here: DDP counts the passes of inner gradients
    ours, wrapped = make(critics.SharedConv, static_graph=True)
    whole = copy.deepcopy(ours)
    for _ in range(3):
        ours.zero_grad()
        whole.zero_grad()
        fastgan.critic_step(wrapped, *batches(rank), **R12).loss.backward()
        for k in range(2):
            (textbook(whole, *batches(k), **R12)[0] / 2).backward()
        assert reference.error(reference.grads(ours), reference.grads(whole)) <= 1e-12


def no_sync(rank):
    real, fake = batches(rank)
    ours, wrapped = make(Drifting)
    alone = copy.deepcopy(ours)
    wrapped.reducer = Counting(wrapped.reducer)
    with wrapped.no_sync():
        fastgan.critic_step(wrapped, real, fake, **R12).loss.backward()
    assert wrapped.reducer.backwards == 0
    textbook(alone, real, fake, **R12)[0].backward()
    used = [p for p in alone.parameters() if p.grad is not None]
    local = [p.grad for p, q in zip(ours.parameters(), alone.parameters(), strict=True) if q.grad is not None]
    if rank == 0:
        assert reference.error(local, [p.grad for p in used]) <= 1e-12
    fastgan.critic_step(wrapped, real, fake, real_args=(True,), **R12).loss.backward()  # accumulates, and averages the sum
    assert wrapped.reducer.backwards == 1
    for p in ours.parameters():
        first = p.grad.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, p.grad)


def compiled(rank):
    step = same_as_textbook(rank, critics.SharedConv, R12, compiled="eager")
    assert step.method == "fused" and "run eagerly" not in step.why
    step = same_as_textbook(rank, Drifting, R12, arguments=(True,), compiled="eager")
    assert "broadcasts buffers" in step.why


def penalties_alone(rank):
    # the last bias has no part in the penalty: eager users add 0 * scores, or DDP waits for its gradient for ever
    real, _ = batches(rank)
    for critic, methods in (
        (critics.SharedConv, ("auto", "fused", "jvp", "double_backward")),
        (lambda: nn.Sequential(critics.conv(3, 4), nn.Softplus(), critics.head(4)), ("auto", "finite_difference")),
    ):
        for method in methods:
            for find_unused in (False, True):
                ours, wrapped = make(critic, find_unused_parameters=find_unused)
                whole = copy.deepcopy(ours)
                for scores_first in (None, False, True):
                    ours.zero_grad()
                    whole.zero_grad()
                    both = lambda c, penalty, first: (  # noqa: E731
                        penalty() if first is None else c(real).mean() + penalty() if first else penalty() + c(real).mean()
                    )
                    both(wrapped, lambda: fastgan.r1_penalty(wrapped, real, method=method), scores_first).backward()  # noqa: B023
                    for k in range(2):
                        rows = batches(k)[0]
                        (fastgan.r1_penalty(whole, rows, method="double_backward") / 2).backward()
                        if scores_first is not None:
                            (whole(rows).mean() / 2).backward()
                    tolerance = 1e-6 if method == "finite_difference" else 1e-12
                    assert reference.error(reference.grads(ours), reference.grads(whole)) <= tolerance, (method, scores_first)


@pytest.mark.parametrize(
    "target", [plain, buffers, unused, static_graph, no_sync, compiled, penalties_alone], ids=lambda f: f.__name__
)
def test_two_processes(target):
    on_ranks(target)
