"""Traps of critics."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.utils import _pytree as pytree

from fastgan.critic.forward import Snapshot
from fastgan.critic.replicas import refuse_sharded
from fastgan.dropin.findings import Finding
from fastgan.functional import largest_singular_value
from fastgan.nn.utils.spectral_norm import SpectralNorm

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def structure(critic):
    """Findings about a critic as it stands."""
    inner = critic
    if isinstance(critic, DistributedDataParallel):
        inner = critic.module
        if critic.broadcast_buffers and next(inner.buffers(), None) is not None:
            yield Finding(
                "DDP broadcasts buffers",
                "critic",
                "each forward overwrites buffers that earlier forwards of the same step still need: backward raises, or "
                "takes other values",
                "broadcast_buffers=False, or fastgan.critic_step",
            )
    if hasattr(critic, "_orig_mod"):
        inner = critic._orig_mod
        yield Finding(
            "compiled critic", "critic", "what torch.compile makes cannot be differentiated twice: penalties raise",
            "penalise the module that was compiled, or fastgan.critic_step(compile=True)",
        )  # fmt: skip
    try:
        refuse_sharded(critic)
    except ValueError as error:
        yield Finding("sharded critic", "critic", str(error), "DistributedDataParallel for the critic")
    half = sorted(
        {str(p.dtype).removeprefix("torch.") for p in inner.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    )
    if half:
        yield Finding(
            f"parameters in {' and '.join(half)}", "critic",
            "squared gradients overflow float16 where their norm is above 255, and lose half their digits in bfloat16",
            "float32 parameters under torch.autocast; fastgan's penalties sum squares in float32",
        )  # fmt: skip
    norms = [name for name, m in inner.named_modules() if isinstance(m, _BATCH_NORM) and m.training]
    if norms:
        yield Finding(
            "batch norm", _some(norms),
            "each score depends on the whole batch, so that no sample has a gradient of its own to penalise; running "
            "statistics also move in every penalty's forward",
            "layer, instance or group norm, spectral norm, or none",
        )  # fmt: skip
    torchs, stale = [], []
    for name, module in inner.named_modules():
        for weight, u, v, dim in _normalised(module):
            if not module.training and not _is_top(weight, u, v, dim):
                stale.append(name)
        if any(isinstance(h, TorchHook) and not isinstance(h, SpectralNorm) for h in module._forward_pre_hooks.values()):
            torchs.append(name)
    if stale:
        yield Finding(
            "spectral norm frozen in eval", _some(stale),
            "in eval mode u and v do not move, and these are far from the weight's singular vectors: sigma is wrong",
            "a few forwards in train mode first, or load their buffers with the weights",
        )  # fmt: skip
    if torchs:
        yield Finding(
            "torch's spectral norm hook", _some(torchs),
            "copy.deepcopy (averaged weights) fails after a forward, because the weight belongs to a graph",
            "fastgan.accelerate(model), or import fastgan.auto",
        )  # fmt: skip


def _some(names):
    names = [name or "(the model)" for name in names]
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")


def _normalised(module):
    """(weight, u, v, dim) of torch's or fastgan's spectral norms of a module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHook):
            yield *(getattr(module, hook.name + suffix) for suffix in ("_orig", "_u", "_v")), hook.dim
    if parametrize.is_parametrized(module):
        for chain in module.parametrizations.values():
            for form in chain:
                if hasattr(form, "_u") and hasattr(form, "_v"):
                    yield chain.original, form._u, form._v, form.dim


@torch.no_grad()
def _is_top(weight, u, v, dim):
    weight, u, v = weight.detach().float(), u.float(), v.float()
    stored = u @ weight.movedim(dim, 0).flatten(1) @ v
    return bool(stored >= 0.9 * largest_singular_value(weight, u, v, dim=dim, n_power_iterations=20)[2])


def behaviour(critic, inputs, batch_norm):
    """(its output, or None, and findings) of a critic at work, which is left as it was."""
    x = next((t for t in inputs if isinstance(t, torch.Tensor)), None)
    state, modes = Snapshot(critic, x.device if x is not None else torch.device("cpu")), [m.training for m in critic.modules()]
    fixed = [(p, p.detach().clone()) for p in critic.parameters() if not p.requires_grad]  # some keep u and v there
    found, output = [], None
    try:
        with torch.enable_grad():
            output = _run(critic, inputs)
            found += _interaction(critic, inputs, batch_norm)
            state.restore()
            found += _twice(critic, inputs)
            state.restore()
            found += _partial_batch(critic, inputs)
            state.restore()
            found += _moving_in_eval(critic, inputs)
    finally:
        for module, training in zip(critic.modules(), modes, strict=True):
            module.training = training
        state.restore()
        for parameter, value in fixed:
            parameter.data.copy_(value)
    return output, found


def _run(critic, inputs):
    return critic(*(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs))


def _scores(output):
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _leaf(inputs):
    return [t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]


def _interaction(critic, inputs, batch_norm):
    inputs = _leaf(inputs)
    x = next((t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad), None)
    if batch_norm or x is None or x.shape[0] < 2:
        return
    firsts = [s[0].sum() for s in _scores(critic(*inputs)) if s.dim() and s.shape[0] == x.shape[0] and s.requires_grad]
    if not firsts:
        return
    try:
        (g,) = torch.autograd.grad(sum(firsts), x, allow_unused=True)
    except RuntimeError:
        return  # as the next look will find
    if g is not None and bool(((g[1:] != 0) & g[1:].isfinite()).any()):
        yield Finding(
            "samples interact", "critic",
            "a score depends on other samples (minibatch features, attention over the batch): the penalty takes the "
            "gradient of the sum of scores, not of each score alone",
            "meant for minibatch stddev and discrimination, where papers penalise all the same; a mistake elsewhere",
        )  # fmt: skip


def _twice(critic, inputs):
    inputs = _leaf(inputs)
    x = next((t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad), None)
    parameters = [p for p in critic.parameters() if p.requires_grad]
    if x is None or not parameters:
        return
    try:
        total = sum(s.sum() for s in _scores(critic(*inputs)) if s.requires_grad)
        (g,) = torch.autograd.grad(total, x, create_graph=True)
        torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)
    except Exception as error:
        if "does not require grad" in str(error):
            return  # linear throughout: nothing to differentiate a second time
        yield Finding(
            "not differentiable twice", "critic", f"a penalty raises: {str(error).splitlines()[0]}",
            'fastgan.explain(critic, x) says where; method="jvp" needs no double backward; checkpoint(use_reentrant=False)',
        )  # fmt: skip


def _partial_batch(critic, inputs):
    x = next((t for t in inputs if isinstance(t, torch.Tensor)), None)
    n = x.shape[0] - 1 if x is not None and x.dim() else 0
    if n < 1:
        return
    smaller = [t[:n] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == n + 1 else t for t in inputs]
    try:
        _run(critic, smaller)
    except Exception as error:
        yield Finding(
            f"fails on a batch of {n}", "critic",
            f"the last batch of an epoch is smaller: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "drop_last=True in the loader, or fastgan.minibatch_stddev, which takes any batch",
        )  # fmt: skip


def _moving_in_eval(critic, inputs):
    critic.eval()
    before = [(name, b, b.clone()) for name, b in critic.named_buffers()]
    vectors = [(name, p, p.detach().clone()) for name, p in critic.named_parameters() if not p.requires_grad]
    with torch.no_grad():
        _run(critic, inputs)
    moved = [name for name, now, then in before + vectors if not torch.equal(now, then)]
    if moved:
        yield Finding(
            "state moves in eval mode", _some(moved),
            "evaluating changes the critic: results depend on how often it was looked at",
            "fastgan.spectral_norm, which leaves u and v alone in eval mode",
        )  # fmt: skip
