"""Gradient penalties of critics (and the path-length penalty of generators).

Every function returns a scalar to be added to a loss. With ``method="auto"`` the gradients it delivers are exact; where
the critic allows it they are computed first-order, with a third less arithmetic than double backward (see
:mod:`fastgan.critic`). The per-sample norm is the L2 norm over everything but the batch, its derivative at 0 is 0, and
float16/bfloat16 gradients are squared and summed in float32.

Shared arguments
----------------
``critic``: any callable of a batch, usually a module. ``args``: further arguments, ``critic(x, *args)``.
``method``: ``"auto"`` (fastest exact), ``"fused"`` (the shared pass, RuntimeError where it is not exact), ``"jvp"``,
``"finite_difference"`` (approximate; ValueError for critics with kinks unless ``force``), ``"double_backward"``.
``score_fn``: picks the scores out of a dict or nested output. ``output_weights``: one weight per score tensor of a
multi-output critic (default 1). ``mask``: multiplies the gradient before its norm. ``grad_scaler``: a
:class:`torch.amp.GradScaler` whose scale the inner gradient is computed with, and divided by in float32.
``return_norms``: return ``(penalty, norms)``, norms (N,) detached.

Inputs are detached: they may be non-leaf or require gradients, nothing flows into them and they are not changed.
Forwards move buffers and random state exactly once, as in the textbook formula. A penalty computed by anything but
``"double_backward"`` can be sent backward once and not differentiated again.
"""

import math
from dataclasses import dataclass

import torch

from fastgan._dtypes import accumulate_dtype

from .critic import engine, fallback
from .critic.deliver import Delivery
from .critic.forward import Forward, unwrap
from .critic.inputs import check_batch, interpolate, scale_of, weights_for
from .critic.outputs import score_list
from .critic.reduction import Form, penalty_value
from .critic.replicas import Replica, refuse_sharded
from .ops.gradient_penalty import norms_of

__all__ = [
    "LazySchedule",
    "dragan_penalty",
    "gradient_penalty",
    "interpolate",
    "max_gradient_penalty",
    "path_length_penalty",
    "penalty_from_output",
    "r1_penalty",
    "r2_penalty",
    "wgan_div_penalty",
    "zero_centered_penalty",
]  # fmt: skip

_KIND_NAMES = {
    "gradient_penalty": "gradient_penalty",
    "wgan_gp": "gradient_penalty",
    "dragan": "gradient_penalty",
    "r1": "zero_centered",
    "r2": "zero_centered",
    "zero_centered": "zero_centered",
    "wgan_div": "power",
    "power": "power",
    "max": "max",
}


def penalise(
    critic, inputs, args, form, *, method="auto", score_fn=None, output_weights=None, grad_scaler=None, force=False,
    return_norms=False,
):  # fmt: skip
    """The penalty ``form`` at ``inputs``: what every function of this module comes down to."""
    engine.check_method(method)
    check_batch("inputs", inputs)
    refuse_sharded(critic)
    replica = Replica(unwrap(critic))
    critic, scale = unwrap(replica.module), scale_of(grad_scaler)
    with replica.forward():
        forward = Forward(critic, inputs, args, score_fn, replayable=engine.may_repeat(critic, method))
    weights = weights_for(forward.scores, output_weights)
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            g = fallback.input_gradient(forward, weights, scale)
        value, norms = penalty_value(g, form)
    else:
        value, norms = _with_gradients(forward, form, weights, method, scale, force, replica.ddp is not None)
        value = replica.finish(value)
    return (value, norms.detach()) if return_norms else value


def _with_gradients(forward, form, weights, method, scale, force, every_leaf):
    """(penalty with gradients attached, norms). ``every_leaf``: even those that only the scores depend on (a last bias) get a
    gradient, which DistributedDataParallel waits for."""

    def differentiable():
        value, norms = fallback.differentiable_penalty(forward, form, weights, scale)
        return value + 0 * fallback.weighted_sum(forward.scores, weights) if every_leaf else value, norms

    if method == "double_backward":
        return differentiable()
    try:
        if method in ("auto", "fused"):
            found = engine.shared_pass(forward, None, form, weights, scale)
        else:
            found = engine.directional(forward, None, form, weights, method, scale, force)
    except engine.Refused as refused:
        if method == "fused":
            raise RuntimeError(f'method="fused" is not exact for this critic: {refused}') from refused
        if not engine.forward_mode_instead(forward):
            return differentiable()
        found = engine.directional(forward, None, form, weights, "jvp", scale)
    for key, leaf in found.leaves.items():
        if key not in found.gradients:
            found.gradients[key] = torch.zeros_like(leaf)  # biases: as eager, whose second derivatives are dense zeros
    return Delivery(found.gradients, found.leaves, found.checks).attach(found.penalty), found.norms


def gradient_penalty(
    critic, real, fake, *, args=(), weight=10.0, target=1.0, one_sided=False, alpha=None, generator=None,
    method="auto", score_fn=None, output_weights=None, pac=1, mask=None, grad_scaler=None, force=False,
    return_norms=False,
):  # fmt: skip
    """weight * mean_i (||grad D(x^_i)|| - target)^2 at x^ = alpha * real + (1 - alpha) * fake.

    ``real``, ``fake``: (B, ...), floating point, one shape. ``alpha``: see :func:`interpolate`, drawn by ``generator``.
    ``one_sided``: only norms above the target count. ``pac``: rows per sample of a packed critic (PacGAN, CTGAN), which
    share one alpha and one norm. Other arguments: see the module. Returns a scalar.
    Raises TypeError, ValueError for unsuitable inputs and RuntimeError if the scores do not depend on the input.
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017; one-sided: Petzka et al., 2018.
    """
    form = Form("gradient_penalty", weight, target, one_sided, pac=pac, mask=mask)
    inputs = interpolate(real, fake, alpha=alpha, generator=generator, pac=pac)
    return penalise(
        critic, inputs, args, form, method=method, score_fn=score_fn, output_weights=output_weights,
        grad_scaler=grad_scaler, force=force, return_norms=return_norms,
    )  # fmt: skip


def zero_centered_penalty(critic, inputs, *, args=(), weight=10.0, method="auto", pac=1, mask=None, **options):
    """weight / 2 * mean_i ||grad D(x_i)||^2 at any inputs (B, ...). Returns a scalar.

    At interpolates, without the factor 1/2 (Thanh-Tung et al., 2019): ``gradient_penalty(..., target=0.0)``.
    ``options``: score_fn, output_weights, grad_scaler, force, return_norms as for the module.
    Mescheder, Geiger, Nowozin, "Which training methods for GANs do actually converge?", 2018.
    """
    form = Form("zero_centered", weight, pac=pac, mask=mask)
    return penalise(critic, inputs, args, form, method=method, **options)


def r1_penalty(critic, real, *, args=(), weight=10.0, method="auto", **options):
    """weight / 2 * mean_i ||grad D(real_i)||^2. Shapes, options and paper as :func:`zero_centered_penalty`."""
    return zero_centered_penalty(critic, real, args=args, weight=weight, method=method, **options)


def r2_penalty(critic, fake, *, args=(), weight=10.0, method="auto", **options):
    """weight / 2 * mean_i ||grad D(fake_i)||^2. Shapes, options and paper as :func:`zero_centered_penalty`."""
    return zero_centered_penalty(critic, fake, args=args, weight=weight, method=method, **options)


def dragan_penalty(
    critic, real, *, args=(), weight=10.0, target=1.0, one_sided=False, alpha=None, noise=None, noise_scale=0.5,
    generator=None, method="auto", pac=1, mask=None, **options,
):  # fmt: skip
    """:func:`gradient_penalty` between the data and its perturbation real + noise_scale * std(real) * U[0, 1).

    ``noise``: the U of real's shape, if not to be drawn. std is over the whole batch. Returns a scalar.
    Kodali et al., "On convergence and stability of GANs", 2017.
    """
    check_batch("real", real)
    real = real.detach()
    if noise is None:
        noise = torch.rand(real.shape, device=real.device, dtype=real.dtype, generator=generator)
    near = real + noise_scale * real.std() * noise
    return gradient_penalty(
        critic, real, near, args=args, weight=weight, target=target, one_sided=one_sided, alpha=alpha,
        generator=generator, method=method, pac=pac, mask=mask, **options,
    )  # fmt: skip


def wgan_div_penalty(
    critic, real, fake, *, args=(), weight=2.0, power=6.0, alpha=None, generator=None, method="auto", pac=1, mask=None,
    **options,
):  # fmt: skip
    """weight * mean_i ||grad D(x^_i)||^power at interpolates. Returns a scalar.

    Wu et al., "Wasserstein divergence for GANs", 2018 (k = 2, p = 6).
    """
    form = Form("power", weight, power=power, pac=pac, mask=mask)
    inputs = interpolate(real, fake, alpha=alpha, generator=generator, pac=pac)
    return penalise(critic, inputs, args, form, method=method, **options)


def max_gradient_penalty(
    critic, real, fake, *, args=(), weight=1.0, alpha=None, generator=None, method="auto", pac=1, mask=None, **options
):
    """weight * max_i ||grad D(x^_i)||^2 at interpolates; ties share the gradient. Returns a scalar.

    Zhou et al., "Lipschitz generative adversarial nets", 2019.
    """
    form = Form("max", weight, pac=pac, mask=mask)
    inputs = interpolate(real, fake, alpha=alpha, generator=generator, pac=pac)
    return penalise(critic, inputs, args, form, method=method, **options)


def path_length_penalty(
    synthesis, latents, *, args=(), weight=2.0, mean=None, decay=0.01, noise=None, generator=None, method="auto",
    grad_scaler=None, return_norms=False,
):  # fmt: skip
    """weight * mean_i (||J_i^T y|| - a)^2 of a generator's images: StyleGAN2's path-length regularisation.

    ``synthesis(latents, *args)``: images (B, C, H, W). ``latents``: (B, D) or (B, layers, D), whose per-layer norms are
    averaged as squares; if they require gradients the penalty flows on into them (a mapping network), else they are
    detached. ``noise``: y of the images' shape, already divided by sqrt(H * W); drawn with ``generator`` if None.
    ``mean``: 0-dim tensor with the running mean of lengths; it is moved by ``decay`` in place. None: a is the mean
    length of this batch. Returns a differentiable scalar. ``method``: "auto" or "double_backward", which are the same.
    ``grad_scaler``: as for the module.
    Raises ValueError for other methods. Karras et al., "Analyzing and improving StyleGAN", 2020, section 3.2.
    """
    if method not in ("auto", "double_backward"):
        raise ValueError(f'path_length_penalty works by double backward: method="auto", not {method!r}')
    check_batch("latents", latents)
    with torch.enable_grad():
        if not latents.requires_grad:
            latents = latents.detach().requires_grad_(True)
        images = synthesis(latents, *args)
        if noise is None:
            noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
            noise = noise / math.sqrt(math.prod(images.shape[2:]))
        scale = scale_of(grad_scaler)
        (g,) = torch.autograd.grad(fallback.weighted_sum([images * noise], [scale]), latents, create_graph=True)
        squares = (g.to(accumulate_dtype(g.dtype)) / scale).square().sum(-1)
        lengths = norms_of(squares.reshape(squares.shape[0], -1).mean(1))
        centre = lengths.mean()
        if mean is not None:
            centre = mean.detach().to(lengths).lerp(centre, decay)
        penalty = (lengths - centre).square().mean() * weight
    if mean is not None:
        with torch.no_grad():
            mean.copy_(centre)
    return (penalty, lengths.detach()) if return_norms else penalty


def penalty_from_output(
    output, inputs, *, kind, weight=10.0, target=1.0, one_sided=False, power=6.0, pac=1, mask=None, score_fn=None,
    output_weights=None, grad_scaler=None, return_norms=False,
):  # fmt: skip
    """The penalty of an output that is already connected to ``inputs``: differentiable, like the user's own formula.

    ``kind``: "gradient_penalty" ("wgan_gp", "dragan"), "r1", "r2", "zero_centered", "wgan_div" ("power") or "max".
    ``inputs``: (B, ...), must require gradients and be what the output was computed from. Returns a scalar.
    Raises ValueError for an unknown kind and RuntimeError if the output does not depend on the inputs.
    """
    if kind not in _KIND_NAMES:
        raise ValueError(f"unknown penalty kind {kind!r}; known: {', '.join(_KIND_NAMES)}")
    check_batch("inputs", inputs)
    if not inputs.requires_grad:
        raise RuntimeError("inputs do not require gradients: call inputs.requires_grad_() before the critic's forward")
    form = Form(_KIND_NAMES[kind], weight, target, one_sided, power, pac, mask)
    scores = score_list(output, score_fn)
    connected = Forward.captured(None, inputs, scores, traced=False)
    value, norms = fallback.differentiable_penalty(connected, form, weights_for(scores, output_weights), scale_of(grad_scaler))
    return (value, norms.detach()) if return_norms else value


@dataclass(frozen=True)
class LazySchedule:
    """Lazy regularisation: a penalty every ``interval`` steps, ``interval`` times as heavy.

    Karras et al., "Analyzing and improving StyleGAN", 2020, appendix B.
    """

    interval: int

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")

    def weight(self, step, weight):
        """The weight to use at a step (0, 1, ...): 0.0 where the penalty is not due."""
        return weight * self.interval if step % self.interval == 0 else 0.0

    def adam(self, lr, betas):
        """(lr, betas) for Adam that see as much time per step of training as without the extra, lazy updates."""
        ratio = self.interval / (self.interval + 1)
        return lr * ratio, tuple(beta**ratio for beta in betas)
