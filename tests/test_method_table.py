"""README's table of what works with which method: the table below is what is claimed, and every cell is tried.

Words: "exact": gradients of the textbook formula, to 1e-11 in float64. "double backward", "forward mode": exact, by falling
back to it.
"eagerly": exact, uncompiled, and the result says why. "half": as close to float64 as the textbook formula under the same
autocast. "1e-6": to this relative error in float64. "refused": an error that names a way out.
"""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F
from ranks import on_ranks
from test_critic_step import textbook
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastgan

torch.set_num_threads(1)

METHODS = ("auto", "fused", "double_backward", "jvp", "finite_difference")
TABLE = {
    "piecewise-linear critic": ("exact", "exact", "exact", "exact", "refused"),
    "curved critic": ("double backward", "refused", "exact", "exact", "1e-6"),
    "`torch.compile(fullgraph=True)` around the step": ("double backward", "refused", "exact", "refused", "refused"),
    "`compile=True`": ("exact", "exact", "exact", "eagerly", "eagerly"),
    "bfloat16 autocast": ("half", "half", "half", "half", "refused"),
    "float16 autocast with GradScaler": ("half", "half", "half", "half", "refused"),
    "GradScaler": ("exact", "exact", "exact", "exact", "1e-6"),
    "checkpointing, non-reentrant": ("double backward", "refused", "exact", "refused", "1e-6"),
    "checkpointing, reentrant": ("refused", "refused", "refused", "refused", "refused"),
    "attention, flash kernel": ("forward mode", "refused", "refused", "exact", "1e-6"),
    "attention, math kernel": ("double backward", "refused", "exact", "exact", "1e-6"),
    "DistributedDataParallel": ("exact", "exact", "exact", "exact", "1e-6"),
    "FSDP2": ("refused", "refused", "refused", "refused", "refused"),
}
WAYS_OUT = r"method=|use_reentrant=False|DistributedDataParallel|float32|force=True"
STEP = {"loss": "relativistic", "r1": 1.3, "r2": 0.7}


class Critic(nn.Module):
    """Two hidden layers with ``activation``; ``middle`` runs the second."""

    def __init__(self, activation, middle=lambda layer, x: layer(x)):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.activation, self.middle = activation, middle

    def forward(self, x):
        x = self.activation(self.first(x))
        return self.out(self.activation(self.middle(self.second, x)))


class AttentionCritic(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.first, self.out, self.kernel = nn.Linear(4, 24), nn.Linear(8, 1), kernel

    def forward(self, x):
        q, k, v = self.first(x.unflatten(1, (1, 6, 4))).chunk(3, -1)
        with sdpa_kernel(self.kernel):
            return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def piecewise(x):
    return F.leaky_relu(x, 0.2)


def checkpointed(reentrant):
    return lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)


def critic_of(row, method):
    """A critic that the method can serve as such, where there is one."""
    activation = F.softplus if method == "finite_difference" else piecewise
    if row == "curved critic":
        return Critic(F.softplus)
    if row == "piecewise-linear critic":
        return Critic(piecewise)
    if row.startswith("checkpointing"):
        return Critic(activation, checkpointed("non-" not in row))
    if row.startswith("attention"):
        return AttentionCritic(SDPBackend.FLASH_ATTENTION if "flash" in row else SDPBackend.MATH)
    return Critic(activation)


def data(dtype=torch.float64):
    torch.manual_seed(10)
    return torch.randn(2, 8, 24, dtype=dtype)


def gradients(critic, run):
    critic.zero_grad()
    run().backward()
    return [p.grad.clone() for p in critic.parameters()]


def truth(critic):
    critic = copy.deepcopy(critic).double()
    critic.kernel, critic.middle = SDPBackend.MATH, lambda layer, x: layer(x)
    return gradients(critic, lambda: textbook(critic, *data(), **STEP)[0])


def observe(row, method):
    """What happens, in the table's words, and the error's text if there is one."""
    torch.manual_seed(0)
    critic = critic_of(row, method).double()
    want = truth(critic)
    real, fake = data()
    options, steps, step = {"method": method}, 1, None

    def run():
        nonlocal step
        step = fastgan.critic_step(critic, real, fake, **options, **STEP)
        return step.loss

    around, scaler = contextlib.nullcontext(), None
    if row.startswith("`torch.compile"):
        compiled = torch.compile(
            lambda r, f: fastgan.critic_step(critic, r, f, **options, **STEP), fullgraph=True, backend="aot_eager"
        )

        def run():
            nonlocal step
            step = compiled(real, fake)
            return step.loss

    if row == "`compile=True`":
        options["compile"], steps = True, 3
    if "GradScaler" in row:
        scaler = options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if "autocast" in row:
        critic, real, fake = critic.float(), real.float(), fake.float()
        around = torch.autocast("cpu", torch.bfloat16 if "bfloat16" in row else torch.float16)
    try:
        for _ in range(steps):
            critic.zero_grad()
            with around:
                loss = run()
            if scaler is None:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(torch.optim.SGD(critic.parameters(), 0.1))
        got = reference.grads(critic)
    except Exception as error:
        return "refused", str(error)
    error = reference.error(got, want)
    if "autocast" in row:
        plain = copy.deepcopy(critic)
        with around:
            loss = textbook(plain, real, fake, **STEP)[0]
        plain.zero_grad()
        loss.backward()
        return ("half" if error <= 2 * reference.error(reference.grads(plain), want) else f"off by {error:.1e}"), ""
    if error > (1e-6 if method == "finite_difference" else 1e-11):
        return f"off by {error:.1e}", ""
    if "run eagerly" in step.why:
        return "eagerly", ""
    if method == "finite_difference":
        return "1e-6", ""
    fallback = {"double_backward": "double backward", "jvp": "forward mode"}.get(step.method)
    return fallback if method == "auto" and fallback else "exact", ""


ALONE = [row for row in TABLE if row not in ("DistributedDataParallel", "FSDP2")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ALONE)
def test_cell(row, method):
    try:
        found, message = observe(row, method)
    finally:
        torch._dynamo.reset()
    claimed = TABLE[row][METHODS.index(method)]
    assert found == claimed, message
    if found == "refused":
        assert re.search(WAYS_OUT, message), message


# --- two processes ---------------------------------------------------------------------------------------------------


def _rank(rank, row, results):
    rows, found = slice(4 * rank, 4 * rank + 4), {}
    real, fake = data()
    for method in METHODS:
        torch.manual_seed(0)
        critic = critic_of(row, method).double()
        whole = copy.deepcopy(critic)
        whole.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (textbook(whole, real[half], fake[half], **STEP)[0] / 2).backward()
        if row == "FSDP2":
            fully_shard(critic)
            wrapped = critic
            with pytest.raises(ValueError, match="sharded by FSDP"):  # penalties alone say so too
                fastgan.r1_penalty(critic, real[rows], method=method)
        else:
            wrapped = nn.parallel.DistributedDataParallel(critic)
        try:
            for _ in range(2):
                critic.zero_grad()
                fastgan.critic_step(wrapped, real[rows], fake[rows], method=method, **STEP).loss.backward()
            error = reference.error(reference.grads(critic), reference.grads(whole))
            limit, word = (1e-6, "1e-6") if method == "finite_difference" else (1e-11, "exact")
            found[method] = word if error <= limit else f"off by {error:.1e}", ""
        except Exception as error:
            found[method] = "refused", str(error)
    if rank == 0:
        torch.save(found, results)


@pytest.mark.parametrize("row", [row for row in TABLE if row not in ALONE])
def test_cells_of_two_processes(row, tmp_path):
    on_ranks(_rank, row, str(tmp_path / "out"))
    found = torch.load(tmp_path / "out")
    assert tuple(found[method][0] for method in METHODS) == TABLE[row], found
    for word, message in found.values():
        assert word != "refused" or re.search(WAYS_OUT, message), message


def test_readme_shows_this_table():
    lines = ["| | " + " | ".join(f"`{m}`" for m in METHODS) + " |", "| --- " * (len(METHODS) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cells) + " |" for row, cells in TABLE.items()]
    assert "\n".join(lines) in (Path(__file__).parent.parent / "README.md").read_text()
