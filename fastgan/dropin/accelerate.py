"""``accelerate`` and ``restore``: a model on fastgan's kernels, in place, and back."""

import torch
from torch import nn

from fastgan.dropin import layers, probe, second_order, served, spectral, spectral_layers
from fastgan.dropin.report import Replaced, Report, Skipped
from fastgan.dropin.swap import Swap


def accelerate(model: nn.Module, *, verify: bool = False, example_inputs=None) -> Report:
    """Let fastgan serve what it can of a model, anywhere in its tree, in place and without touching its numbers.

    * torch's spectral norm, hook and parametrization: fastgan's, with the same parameters, buffers, keys and order of hooks.
    * Spectral norm in layers of BigGAN-PyTorch, mimicry, torchgan and christiancosgrove's much copied wrapper: recognised by
      structure and a probe of value, gradient and what becomes of u and v, in training and in evaluation.
    * Minibatch discrimination (torchgan's, improved-gan's and their like) and minibatch standard deviation (StyleGAN's,
      pytorch_GAN_zoo's, mmgeneration's): recognised by name, structure and a numeric probe with two derivatives.
    * Gradient penalties that *you* write, with ``autograd.grad(..., create_graph=True)``: double backward no longer runs
      through the dense zeros that PyTorch returns for second derivatives of ReLU, LeakyReLU, pooling and padding, in modules
      and in functional calls alike: 10 units of arithmetic instead of 12 for a WGAN-GP step.

    Every parameter stays the same object, so optimizers need no telling. Names, buffers and state_dict keys stay;
    ``deepcopy``, pickle and ``torch.save`` work as before. :func:`restore` takes everything back. Call it before
    ``torch.compile``; ``torch.jit.script``, which compiles hooks too, wants the model restored.

    Args:
        model: any module: a critic, a generator, a module that holds both. May be wrapped in DistributedDataParallel.
        verify: run a batch before and after: outputs, gradients and a penalty's gradients. What differs is undone and listed as
            skipped. Buffers, random state and ``.grad`` are left as they were.
        example_inputs: for ``verify``: a tensor or a tuple of arguments. Guessed from the first layer if left out.

    Returns:
        A :class:`fastgan.dropin.Report`: ``.replaced``, ``.skipped`` with reasons; prints as a table.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``verify`` without ``example_inputs`` for a model whose input can't be guessed. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is {type(model).__name__}, expected a torch.nn.Module: call it once per network")
    inputs = probe.example_for(model, example_inputs) if verify else None
    report = Report()
    swaps = []
    for found in [*spectral.find(model), *spectral_layers.find(model), *layers.find(model), *second_order.find(model)]:
        (swaps if isinstance(found, Swap) else report.skipped).append(found)
    report.skipped += _compiled(model)
    before = probe.observe(model, inputs) if verify else None
    for swap in swaps:
        swap.apply()
    if verify:
        swaps = _verified(model, inputs, before, swaps, report)
    for swap in swaps:
        report.replaced.append(Replaced(swap.name, swap.kind, swap.by))
        if swap.by == second_order.BY:
            report.replaced += second_order.modules_served(model)
    return report


def _verified(model, inputs, before, swaps, report) -> list[Swap]:
    """The swaps that change nothing on the probe; the others are undone and reported."""
    what, error = probe.difference(before, probe.observe(model, inputs))
    kept = swaps
    if what:  # which of them? one by one from the start
        for swap in reversed(swaps):
            swap.undo()
        kept, error = [], 0.0
        for swap in swaps:
            swap.apply()
            what, its_error = probe.difference(before, probe.observe(model, inputs))
            if what:
                swap.undo()
                report.skipped.append(Skipped(swap.name, swap.kind, f"{swap.by} refused by the probe: {what}"))
            else:
                kept.append(swap)
                error = its_error
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs if isinstance(t, torch.Tensor))
    checked = ", ".join(before)
    report.verified = f"verified on a batch {shapes}: {checked} agree, largest relative error {error:.1e}"
    return kept


def _compiled(model) -> list[Skipped]:
    why = "compiled already, and runs what was compiled: accelerate the model first, then torch.compile it"
    return [Skipped(name, type(m).__name__, why) for name, m in model.named_modules() if hasattr(m, "_orig_mod")]


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: classes and hooks are what they were. Works on copies and unpickled models too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a spectral norm that was torch's is in a :class:`fastgan.SpectralNormGroup`; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is {type(model).__name__}, expected the torch.nn.Module that accelerate was given")
    undo = [undo for module in model.modules() for undo in spectral.swapped(module)]
    for take_back in undo:
        take_back()
    for module in model.modules():
        if served.is_served(module):
            served.undo(module)
        second_order.unhook(module)
    return model
