"""Steps in plain PyTorch, penalty written by hand: the critic as it is, and after ``fastgan.accelerate``."""

import torch

import fastgan

from .case import OURS, Case
from .critic_step import CRITICS, MODES, _eager, network_of


def _case(name: str, batch: int, mode: str, goal: float) -> Case:
    make, shape = CRITICS[name]

    def start():
        torch.manual_seed(0)
        critic = make().eval()  # without dropout, so that gradients can be compared
        return critic, (*torch.randn(2, batch, *shape), torch.rand(batch, *[1] * len(shape)))

    def candidates():
        critic, batches = start()
        fastgan.accelerate(critic)
        return {OURS: _eager(critic, batches, MODES[mode]), "eager": _eager(*start(), MODES[mode])}

    def truth():
        critic, batches = start()
        return _eager(critic.double(), tuple(x.double() for x in batches), MODES[mode])()

    return Case("accelerate", f"{name}-b{batch}", mode, candidates, truth, {"eager": goal}, tolerance=1e-3)


def made(size: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*network_of(size, dtype), mode, goal) for mode, goal in (("WGAN-GP", 1.15), ("R1+R2", 1.0))]


CASES = [
    *(_case(name, 16, "WGAN-GP", 1.15) for name in ("dcgan64", "sngan-resnet32", "r3gan-like32")),
    _case("sngan-resnet32", 16, "R1+R2", 1.0),  # its zeros are added to what flows there anyhow
    _case("ctgan-mlp", 256, "WGAN-GP", 1.0),
]
