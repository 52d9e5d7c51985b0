"""``declare``: one call turns a specification (schema, reference, fake, derivatives) into a dispatcher operator.

What the dispatcher holds for an operator afterwards::

    CompositeExplicitAutograd       the plain-torch reference: every device works at once
    CPU, CUDA                       filled by native kernels where there are any (fastgan/backends.py)
    Autograd                        the derivatives, forward mode included
    FuncTorchDynamicLayerFrontMode  the same derivatives under torch.func transforms
    Meta                            shapes and dtypes, for torch.compile and opcheck

``torch.library.register_autograd`` is not used: it drops forward-mode tangents without an error and refuses
``torch.func.grad``. One ``autograd.Function`` under both keys serves eager, ``torch.compile`` and ``torch.func``.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

NAMESPACE = "fastgan"
_library = torch.library.Library(NAMESPACE, "DEF")

#: operator name -> its reference, in order of declaration: what backends have to serve
references: dict[str, Callable] = {}
#: (backend, operator) -> how often a Python kernel of it ran; native kernels count for themselves
executed: Counter = Counter()


def counted(backend: str, name: str, kernel: Callable) -> Callable:
    """``kernel``, counting in ``executed``: lets a test prove which backend served a call."""

    def run(*inputs):
        executed[backend, name] += 1
        return kernel(*inputs)

    return run


def declare(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    jvp: Callable | None = None,
    vmap: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define ``fastgan::<schema>`` and return the operator.

    ``setup_context``, ``backward``, ``jvp`` and ``vmap`` are the static methods of ``torch.autograd.Function`` of these
    names. Formulas made of declared operators are differentiable again; a missing one raises an error that says so.
    The schema has no default values: the dispatcher would strip them before the formulas see them.
    """
    name = schema.partition("(")[0].strip()
    _library.define(schema)
    _library.impl(name, counted("reference", name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    references[name] = reference

    def below_autograd(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def missing(mode: str) -> Callable:
        def raise_missing(ctx, *_):
            raise RuntimeError(
                f"fastgan::{name} has no {mode} derivative: it is itself a derivative, and one order more was asked for. "
                f"For higher orders differentiate a composition of plain torch operators instead."
            )

        return raise_missing

    methods = {
        "forward": below_autograd,
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": backward or missing("reverse-mode"),
        "jvp": jvp or missing("forward-mode"),
    }
    if vmap is not None:
        methods["vmap"] = vmap
    function = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})
    # Function.apply minus its look for torch.func transforms: under the Autograd key there are none.
    apply_single = super(torch.autograd.Function, function).apply

    def autograd(*inputs):
        if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(*inputs)
        return apply_single(*inputs)

    def transformed(*inputs):  # by name: Function.apply is looked up again for each transform
        return function.apply(*inputs)

    _library.impl(name, autograd, "Autograd")
    _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")
    return op
