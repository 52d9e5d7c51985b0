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


def _is_list_of_tensors(value) -> bool:
    """Or of their gradients; not of numbers, which autograd passes through as they are."""
    return isinstance(value, list) and not (value and isinstance(value[0], int))


def _flatten(values) -> tuple[list, tuple]:
    """Lists taken apart, as autograd wants to see tensors, and what puts them together: a length, or None for no list."""
    flat = []
    for value in values:
        flat.extend(value) if _is_list_of_tensors(value) else flat.append(value)
    return flat, tuple(len(value) if _is_list_of_tensors(value) else None for value in values)


def _unflatten(flat, layout) -> list:
    values = iter(flat)
    return [next(values) if length is None else [next(values) for _ in range(length)] for length in layout]


def _as_returned(flat, returns: list[str], length: int):
    values = _unflatten(flat, [length if kind.endswith("[]") else None for kind in returns])
    return tuple(values) if len(values) > 1 else values[0]


def _flat_call(call: Callable) -> Callable:
    return lambda layout, *flat: tuple(_flatten(call(*_unflatten(flat, layout)))[0])


def _flattened(methods: dict[str, Callable]) -> dict[str, Callable]:
    """The methods of an ``autograd.Function`` that takes the layout of the lists first, then everything flat."""

    def setup_context(ctx, inputs, output):
        ctx.layout = inputs[0]
        methods["setup_context"](ctx, _unflatten(inputs[1:], ctx.layout), output)

    def backward(ctx, *grads):
        return None, *_flatten(methods["backward"](ctx, *grads))[0]

    def jvp(ctx, _, *tangents):
        return methods["jvp"](ctx, *_unflatten(tangents, ctx.layout))

    return {"forward": _flat_call(methods["forward"]), "setup_context": setup_context, "backward": backward, "jvp": jvp}


def _looped(call: Callable) -> Callable:
    """A vmap rule that calls the operator once per element: for operators that no one batches in earnest."""

    def rule(info, in_dims, *args):
        def element(i):
            picked = (x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
            return call(*picked)

        results = [element(i) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def save_inputs(ctx, inputs, output):
    """A ``setup_context`` for formulas that need the operator's tensors and nothing else."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


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
    names. Formulas made of declared operators are differentiable again; a missing one raises an error that says so, but
    for ``vmap``, which then loops. Formulas of an operator on lists get its inputs (or their tangents) as lists and return
    gradients as lists; results and their gradients, which autograd counts one by one, come flat. Every list among the
    results is as long as the first among the inputs.

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

    backward = backward or missing("reverse-mode")

    def backward_once(ctx, *grads):  # nothing will differentiate what it computes: past autograd, where Python costs time
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return backward(ctx, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return backward(ctx, *grads)

    methods = {
        "forward": below_autograd,
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": backward_once,
        "jvp": jvp or missing("forward-mode"),
    }
    lists = "[]" in schema
    if lists:
        methods = _flattened(methods)
    methods["vmap"] = vmap or _looped(_flat_call(op) if lists else op)
    function = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})
    # Function.apply minus its look for torch.func transforms: under the Autograd key there are none.
    apply_single = super(torch.autograd.Function, function).apply
    needs_grad = torch._C._any_requires_grad
    returns = schema.partition("->")[2].strip(" ()").split(", ")

    def nested(inputs, apply):
        flat, layout = _flatten(inputs)
        return _as_returned(apply(layout, *flat), returns, next(len(value) for value in inputs if isinstance(value, list)))

    def autograd(*inputs):
        if forward_ad._current_level < 0 and not (
            torch.is_grad_enabled() and needs_grad(*(_flatten(inputs)[0] if lists else inputs))
        ):
            return below_autograd(*inputs)
        return nested(inputs, apply_single) if lists else apply_single(*inputs)

    def transformed(*inputs):  # by name: Function.apply is looked up again for each transform
        return nested(inputs, function.apply) if lists else function.apply(*inputs)

    _library.impl(name, autograd, "Autograd")
    _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")
    return op
