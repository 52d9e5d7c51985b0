"""The same batch before and after: outputs, gradients and a penalty's gradients."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastgan.critic.forward import Snapshot

#: relative error that counts as different. Kernels sum in another order; a kink that rounding flips moves second derivatives.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
_SIZES = (64, 32, 28, 128, 256, 16, 8, 512)


def example_for(model: nn.Module, example_inputs) -> tuple:
    """The inputs as a tuple; made up from the first layer where none are given."""
    if example_inputs is not None:
        return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    for shape, tensor in _guesses(model):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)
        state = Snapshot(model, x.device)
        try:
            with torch.no_grad():
                model(x)
            return (x,)
        except Exception:
            continue
        finally:
            state.restore()
    raise ValueError(
        "accelerate: verify=True needs a batch, and the model's input could not be guessed from its first layer; "
        "give one: accelerate(model, verify=True, example_inputs=images) or example_inputs=(images, labels)"
    )


def _guesses(model):
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        weight = next(module.parameters(), None)  # not .weight, which a parametrization computes, and moves u and v
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            yield (8, module.in_features), weight
            return
        rank = len(module.kernel_size)
        for size in _SIZES if rank < 3 else (16, 32, 8):
            yield (8, module.in_channels, *(size * (64 if rank == 1 else 1),) * rank), weight
        return


def observe(model: nn.Module, inputs: tuple) -> dict[str, list]:
    """ "outputs", "gradients", "penalty's gradients" and "buffers" of one batch; nothing of the model or random state moves."""
    leaves, spec = pytree.tree_flatten(inputs)
    device = next((t.device for t in leaves if isinstance(t, torch.Tensor)), torch.device("cpu"))
    state = Snapshot(model, device)
    try:
        with torch.enable_grad():
            leaves = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in leaves]
            floats = [t.requires_grad_() for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
            outputs = model(*pytree.tree_unflatten(leaves, spec))
            outputs = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            found = {"outputs": [t.detach() for t in outputs], "buffers": [b.clone() for b in model.buffers()]}
            parameters = [p for p in model.parameters() if p.requires_grad]
            total = sum((t * _weights(t)).sum() for t in outputs)
            if not isinstance(total, torch.Tensor) or not total.requires_grad:
                return found
            first = torch.autograd.grad(total, [*parameters, *floats], create_graph=True, allow_unused=True)
            found["gradients"] = [g if g is None else g.detach() for g in first]
            wrt_inputs = [g for g in first[len(parameters) :] if g is not None and g.requires_grad]
            if wrt_inputs and parameters:
                penalty = sum(g.square().sum() for g in wrt_inputs)
                found["penalty's gradients"] = list(torch.autograd.grad(penalty, parameters, allow_unused=True))
            return found
    finally:
        state.restore()


def _weights(t):
    return torch.linspace(1, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)


def difference(before: dict[str, list], after: dict[str, list]) -> tuple[str, float]:
    """("", largest relative error) where they agree, else (what differs, its error)."""
    largest = 0.0
    for what, wanted in before.items():
        got = after.get(what, [])
        if len(got) != len(wanted) or any((a is None) != (b is None) for a, b in zip(wanted, got, strict=True)):
            return f"{what}: other tensors than before", float("inf")
        pairs = [(a.double(), b.double(), a.dtype) for a, b in zip(wanted, got, strict=True) if a is not None]
        if not pairs:
            continue
        if any(a.shape != b.shape for a, b, _ in pairs):
            return f"{what}: other shapes than before", float("inf")
        same = sum(float((a - b).nan_to_num(nan=0.0).square().sum()) for a, b, _ in pairs) ** 0.5
        size = sum(float(a.nan_to_num().square().sum()) for a, _, _ in pairs) ** 0.5
        if any(not torch.equal(a.isfinite(), b.isfinite()) for a, b, _ in pairs):
            return f"{what}: not finite in other places than before", float("inf")
        error = same / size if size else same
        largest = max(largest, error)
        if error > max(_TOLERANCE.get(dtype, 5e-2) for *_, dtype in pairs):
            return f"{what} differ by {error:.1e} of their norm", error
    return "", largest
