"""The critic step, eager and compiled, against double backward: eager, and by torch.func.grad under torch.compile."""

import torch

import fastgan
from fastgan import losses

from . import critics, reference
from .case import OURS, Case

CRITICS = {
    "dcgan64": (lambda: critics.DCGAN(32, 64), (3, 64, 64)),
    "sngan-resnet32": (lambda: critics.SNGAN(64), (3, 32, 32)),
    "r3gan-like32": (lambda: critics.R3GAN(32), (3, 32, 32)),
    "ctgan-mlp": (lambda: critics.CTGAN(256, 512), (256,)),
    "hifi-1d": (lambda: critics.HiFi(16), (1, 8192)),
    # as wide as papers have them: for GPUs, --size dcgan128-b64
    "dcgan128": (lambda: critics.DCGAN(64, 128), (3, 128, 128)),
    "sngan-wide32": (lambda: critics.SNGAN(128), (3, 32, 32)),
    "r3gan-wide32": (lambda: critics.R3GAN(128, groups=8), (3, 32, 32)),
}
MODES = {
    "R1+R2": {"r1": 1.0, "r2": 1.0, "loss": "relativistic"},
    "R1": {"r1": 1.0, "loss": "non_saturating"},
    "WGAN-GP": {"gradient_penalty": 10.0, "loss": "wasserstein"},
}

BEST = {"R1+R2": 1.35, "R1": 1.25, "WGAN-GP": 1.15}  # the faster of ours against the faster of the others


def _gradients(critic, loss) -> tuple[torch.Tensor]:
    """All parameter gradients of ``loss`` as one vector, so that a tiny one does not decide the relative error."""
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])
    critic.zero_grad(set_to_none=True)
    return (flat,)


def _ours(critic, batches, mode, compile=False):
    real, fake, alpha = batches
    return lambda: _gradients(critic, fastgan.critic_step(critic, real, fake, alpha=alpha, compile=compile, **mode).loss)


def _compiled(critic, batches, mode):
    """The textbook step as torch.compile takes it whole, which is what critic_step is inside torch.compile."""
    step = torch.compile(lambda r, f, a: fastgan.critic_step(critic, r, f, alpha=a, **mode).loss, fullgraph=True, dynamic=False)
    return lambda: _gradients(critic, step(*batches))


def _eager(critic, batches, mode):
    real, fake, alpha = batches
    loss, weights = losses.get(mode["loss"]), (mode.get("gradient_penalty", 0.0), mode.get("r1", 0.0), mode.get("r2", 0.0))
    return lambda: _gradients(critic, reference.step(critic, real, fake, loss, *weights, alpha)[0])


def _case(name: str, batch: int, mode: str, goal: float, compiled: bool = False) -> Case:
    """``compiled``: measure the compiled steps too, ours and torch.compile's, which take minutes to compile."""
    make, shape = CRITICS[name]

    def start():
        """The critic and its batches; the same at each call. Dropout is off, so that gradients can be compared."""
        torch.manual_seed(0)
        critic = make().eval()
        return critic, (*torch.randn(2, batch, *shape), torch.rand(batch, *[1] * len(shape)))

    def candidates():
        found = {OURS: _ours(*start(), MODES[mode]), "eager": _eager(*start(), MODES[mode])}
        if compiled:
            found[f"{OURS} compiled"] = _ours(*start(), MODES[mode], compile=True)
            found["compile"] = _compiled(*start(), MODES[mode])
        return found

    def truth():
        critic, batches = start()
        return _eager(critic.double(), tuple(x.double() for x in batches), MODES[mode])()

    goals = {"eager": goal} | ({"best": BEST[mode]} if compiled else {})
    return Case("critic_step", f"{name}-b{batch}", mode, candidates, truth, goals, tolerance=1e-3, flops=-1)


def network_of(size: str, dtype: torch.dtype) -> tuple[str, int]:
    """(name, batch) of a size; ValueError where it is none."""
    form = f"NETWORK-bBATCH, such as dcgan64-b32, with one of {', '.join(CRITICS)}"
    name, _, batch = size.rpartition("-b")
    if name not in CRITICS or not batch.isdecimal() or int(batch) < 1:
        raise ValueError(f"size {size}: expected {form}")
    if dtype != torch.float32:
        raise ValueError(f"dtype {dtype}: whole networks are measured in float32")
    return name, int(batch)


def made(size: str, dtype: torch.dtype) -> list[Case]:
    return [_case(*network_of(size, dtype), mode, _GOALS[mode]) for mode in MODES]


_GOALS = {"R1+R2": 1.6, "R1": 1.35, "WGAN-GP": 1.28}
_IMAGES = ("dcgan64", "sngan-resnet32", "r3gan-like32")
# Compiled once per critic and only at the smaller batch: inductor takes minutes for each mode. The textbook step of the critic
# like R3GAN's takes it more than six, so that one is left out: _case(..., compiled=True) measures it for those who wait.
_COMPILED = {"dcgan64": "R1+R2", "sngan-resnet32": "R1+R2"}
CASES = [
    *(_case(name, 16, mode, _GOALS[mode], compiled=_COMPILED.get(name) == mode) for name in _IMAGES for mode in MODES),
    *(_case(name, 64, "R1+R2", _GOALS["R1+R2"]) for name in _IMAGES),
    _case("hifi-1d", 16, "R1+R2", 1.45),
    _case("ctgan-mlp", 64, "R1+R2", 1.35),
    _case("ctgan-mlp", 256, "R1+R2", 1.35, compiled=True),
]
