"""``audit``: which of the known traps a critic or a penalty function has fallen into, found by looking and by probing."""

import contextlib

import torch
from torch import nn

from fastgan.dropin import audit_critic, audit_penalty, probe
from fastgan.dropin.findings import Findings


def audit(critic=None, *example_inputs, penalty=None) -> Findings:
    """Look for the traps of penalised critics.

    Of a critic: batch norm and other interaction of samples, layers that cannot be differentiated twice, state that moves in
    eval mode, spectral norm with vectors that are not its weight's, torch's hook that breaks copies, batches that do not
    divide, 16-bit arithmetic, compiled, DDP and FSDP wrappers. Of a penalty: whole-batch and per-pixel norms, no eps under the
    root, alpha drawn in another way than uniformly per sample, no graph, gradients that leak into the generator, changed
    arguments, fixed batch sizes.

    Args:
        critic: a module, or None to look at a penalty alone. It is run a few times and left as it was: buffers, random state,
            mode, gradients.
        example_inputs: a batch (B, ...) and further arguments. Guessed from the first layer if left out; without a guess the
            critic is looked at, not run.
        penalty: ``penalty(critic, real, fake)`` returning a scalar, or a tuple that starts with it. It is called with small
            critics made up for the purpose, whose output has the form of ``critic``'s. Wrap another signature in a lambda.

    Returns:
        A list of :class:`Finding` (what, where, why, way_out) that prints as a table; empty if nothing was found.

    Raises:
        TypeError: neither a critic nor a penalty, or a critic that is not a module.
    """
    if critic is None and penalty is None:
        raise TypeError("audit: give it a critic, a penalty, or both: audit(critic, images, penalty=my_penalty)")
    if critic is not None and not isinstance(critic, nn.Module):
        raise TypeError(f"audit: critic is {type(critic).__name__}, expected a torch.nn.Module; a function goes to penalty=")
    found = Findings()
    output = None
    if critic is not None:
        found += audit_critic.structure(critic)
        sharded = any(f.what == "sharded critic" for f in found)
        if not sharded:
            with contextlib.suppress(ValueError):
                example_inputs = probe.example_for(critic, example_inputs or None)
        if example_inputs and not sharded:
            output, behaviour = audit_critic.behaviour(
                critic, example_inputs, any(f.what.startswith("batch norm") for f in found)
            )
            found += behaviour
    if penalty is not None:
        first = next((t for t in example_inputs if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
        shape = (4, 3, 6, 6) if first is None else tuple(first.shape)
        found += audit_penalty.findings(penalty, shape, output)
    return found
