"""Does every sample travel alone, and where is its index? Asked of the numbers, not of the names.

The shared pass multiplies the activation of sample i by s_i wherever a parameter meets it. That is allowed exactly if
the cotangent of sum_i s_i D_i is, at every tap, s_i times the cotangent of sum_i D_i. The probe sends powers of two
through the graph: multiplying by them is exact in floating point, so independent samples reproduce their cotangents
to the last bit and a weak coupling cannot hide behind rounding. Comparing also tells which dimension holds the sample
index and whether it is the major or the minor part of it (merged batch and channels, augmentations joined by cat).

The signs and exponents come from a generator of its own: the global random state belongs to the user.
"""

import torch

from .analyse import Refused

ROUNDS = 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def spread(s, t, layout):
    """s (N,) as a tensor that broadcasts over t, whose dimension ``layout[0]`` holds N * layout[2] entries."""
    dim, major, repeat = layout
    v = s if repeat == 1 else (s.repeat_interleave(repeat) if major else s.repeat(repeat))
    return v.view([-1 if k == dim else 1 for k in range(t.dim())])


def _candidates(shape, n):
    for dim, size in enumerate(shape):
        if size and size % n == 0:
            yield (dim, True, size // n)
            if size != n:
                yield (dim, False, size // n)


def _fitting(layouts, s, one, scaled):
    tolerance = TOLERANCE.get(one.dtype, 1e-3)
    size = scaled.norm()
    if not bool(torch.isfinite(size)):
        raise Refused("the critic's gradients are not finite, which proves nothing")
    if not bool(size > 0):
        return list(layouts)  # nothing arrives here: no evidence for or against any layout
    return [k for k in layouts if bool((scaled - one * spread(s, one, k).to(one.dtype)).norm() <= tolerance * size)]


def _random_factors(n, dtype, device, generator):
    exponent = torch.randint(0, 6, (n,), generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    s = (2.0**exponent) * sign
    if n > 1 and bool((s == s[0]).all()):
        s[0] = -s[0]
    return s.to(device=device, dtype=dtype)


def find_layouts(nodes, taps, backward, n):
    """Per tap (layout of the output's cotangent, layout of the operand's cotangent).

    ``backward(factors)`` runs one backward pass to the input with the seed of sample i multiplied by factors[i] (None:
    by 1) and keeps the graph. Raises Refused if samples are coupled or if the numbers do not single out one layout.
    """
    generator = torch.Generator().manual_seed(0x5EED)
    ones, fits = {}, {}
    dtype, device = None, None

    def record(tap):
        def hook(grad_inputs, grad_outputs):
            # a product's operand is its only input-dependent slot; joined inputs are located by their output
            ones[tap.tap] = (grad_outputs[0], grad_inputs[tap.x_slots[0]])

        return hook

    factors = None

    def compare(tap):
        def hook(grad_inputs, grad_outputs):
            if tap.tap not in ones:
                return
            pair = []
            for k, (one, scaled) in enumerate(zip(ones[tap.tap], (grad_outputs[0], grad_inputs[tap.x_slots[0]]), strict=False)):
                if one is None or scaled is None:
                    pair.append([])
                    continue
                known = fits[tap.tap][k] if tap.tap in fits else _candidates(one.shape, n)
                pair.append(_fitting(known, factors, one, scaled))
            fits[tap.tap] = pair

        return hook

    with torch.no_grad():
        _with_hooks(nodes, taps, record, lambda: backward(None))
        if not ones:
            return [None] * len(taps)
        first = next(iter(ones.values()))[0]
        dtype, device = first.dtype, first.device
        for _ in range(ROUNDS):
            factors = _random_factors(n, torch.float64 if dtype == torch.float64 else torch.float32, device, generator)
            _with_hooks(nodes, taps, compare, lambda: backward(factors))  # noqa: B023
    layouts = []
    for tap in taps:
        if tap.tap not in ones:
            layouts.append(None)  # no score depends on this place
            continue
        name, shape = nodes[tap.position].name(), tuple(ones[tap.tap][0].shape)
        found = []
        for options, needed in zip(fits[tap.tap], (True, tap.rule.has_product(tap)), strict=False):
            if len(options) != 1 and needed:
                what = "samples are coupled" if not options else "the batch dimension cannot be told apart"
                raise Refused(f"{what} at {name} {shape}", lasting=not options)
            found.append(options[0] if options else None)
        layouts.append(tuple(found))
    return layouts


def _with_hooks(nodes, taps, make, run):
    handles = [nodes[tap.position].register_hook(make(tap)) for tap in taps]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
