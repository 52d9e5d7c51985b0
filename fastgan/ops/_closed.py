"""``declare_closed``: maps whose derivatives of every order asked for are four operators.

For a map y(x) and a constant g the Hessian H_g of <g, y(x)> is symmetric. With J the Jacobian of y at x::

    forward          y(x)
    backward         J^T g
    jvp              J t
    double_backward  J v and H_g v       the derivatives of <v, J^T g> in g and x

H_g v is also the tangent of J^T g along v and, with t for v, the derivative of <g, J t> in x: what a penalised critic asks for,
in reverse or forward mode, closes.
"""

from collections.abc import Callable

from fastgan.ops._declare import declare, save_inputs


def declare_closed(
    name: str,
    options: str,
    *,
    derivative_options: str | None = None,
    references: tuple[Callable, Callable, Callable, Callable],
    like_output: Callable,
    like_input: Callable,
    vmap: Callable | None = None,
):
    """Declare ``name``, ``name_backward``, ``name_jvp`` and ``name_double_backward`` and return the four operators.

    ``options``, ``derivative_options``: as in a schema; the last of the former are the latter, all of them unless given.
    ``references``: of (x, *options) and, with derivative options, of (grad, x, ...), (t, x, ...) and (v, grad, x, ...).
    ``like_output``, ``like_input``: fakes, of x and either options.
    ``vmap``: a rule as :func:`declare` takes it, of the operator.
    """
    forward_reference, backward_reference, jvp_reference, double_backward_reference = references
    derivative_options = options if derivative_options is None else derivative_options
    passed = derivative_options.count(",") + 1 if derivative_options else 0
    nothing = (None,) * passed

    def setup_context(ctx, inputs, output):
        ctx.options = inputs[len(inputs) - passed :]
        save_inputs(ctx, inputs, output)

    def forward_backward(ctx, grad):
        return backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * (options.count(",") + 1)

    def forward_jvp(ctx, t, *_):
        return jvp(t, *ctx.saved_tensors, *ctx.options)

    def backward_backward(ctx, v):
        return *double_backward(v, *ctx.saved_tensors, *ctx.options), *nothing

    def backward_jvp(ctx, t_grad, t_x, *_):
        grad, x = ctx.saved_tensors
        parts = [] if t_grad is None else [backward(t_grad, x, *ctx.options)]
        if t_x is not None:
            parts.append(double_backward(t_x, grad, x, *ctx.options)[1])
        return sum(parts[1:], parts[0])

    def jvp_backward(ctx, h):
        t, x = ctx.saved_tensors
        return backward(h, x, *ctx.options), double_backward(t, h, x, *ctx.options)[1], *nothing

    def declared(suffix: str, inputs: str, results: str, **arguments):
        if vmap:
            arguments["vmap"] = vmap(lambda: op)
        op = declare(f"{name}{suffix}({inputs}) -> {results}", setup_context=setup_context, **arguments)
        return op

    also = f", {derivative_options}" if derivative_options else ""
    forward = declared(
        "",
        f"Tensor x, {options}",
        "Tensor",
        reference=forward_reference,
        fake=like_output,
        backward=forward_backward,
        jvp=forward_jvp,
    )
    backward = declared(
        "_backward",
        f"Tensor grad, Tensor x{also}",
        "Tensor",
        reference=backward_reference,
        fake=lambda grad, *inputs: like_input(*inputs),
        backward=backward_backward,
        jvp=backward_jvp,
    )
    jvp = declared(
        "_jvp",
        f"Tensor t, Tensor x{also}",
        "Tensor",
        reference=jvp_reference,
        fake=lambda t, *inputs: like_output(*inputs),
        backward=jvp_backward,
    )
    double_backward = declared(
        "_double_backward",
        f"Tensor v, Tensor grad, Tensor x{also}",
        "(Tensor, Tensor)",
        reference=double_backward_reference,
        fake=lambda v, grad, *inputs: (like_output(*inputs), like_input(*inputs)),
    )
    return forward, backward, jvp, double_backward
