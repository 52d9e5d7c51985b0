"""``on_ranks``: runs a function in two gloo processes; and what to compare there."""

import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

WORLD = 2


def _enter(rank, port, target, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        target(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Not through the interpreter's end: a thread of gloo or autograd that still lets go of a Python object then is unwound by
    # force, and the process aborts ("terminate called without an active exception"), about once in a thousand.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def assert_as_one_process(rank, counts, full, function):
    """Values and derivatives of ``function(x, group)`` on this rank's rows are those of one process with all rows ``full``."""
    full = full.requires_grad_()
    expected = function(full, None)
    mine = full.detach().split(counts)[rank].clone().requires_grad_()
    ours = function(mine, "world")
    torch.testing.assert_close(ours, expected.split(counts)[rank])
    # the sum over ranks of the losses is the loss of one process
    (g_full,) = torch.autograd.grad(expected.square().sum(), full, create_graph=True)
    (g_mine,) = torch.autograd.grad(ours.square().sum(), mine, create_graph=True)
    torch.testing.assert_close(g_mine, g_full.split(counts)[rank])
    (gg_full,) = torch.autograd.grad(g_full.square().sum(), full)
    (gg_mine,) = torch.autograd.grad(g_mine.square().sum(), mine)
    torch.testing.assert_close(gg_mine, gg_full.split(counts)[rank])


def on_ranks(target, *arguments):
    """Call ``target(rank, *arguments)``, a module's function, in WORLD processes; an exception in one is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_enter, (port, target, arguments), nprocs=WORLD)
