r"""Minibatch standard deviation (Karras et al. 2017, "Progressive Growing of GANs", section 3): the specification.

``x`` (B, C, ...) falls into groups of samples and its channels into ``num_channels`` = F slices of C / F, one behind the other.
With n samples in a group, P positions (channel and place) in a slice, N = n or, ``unbiased``, n - 1, d the deviation from the
mean over the group, :math:`\sigma = \sqrt{\sum_i d_i^2 / N + \varepsilon}` and c the deviation of v (or t) from its mean::

    statistic        s   = mean_P sigma                              one for each group and slice
    forward          y_i = x_i, then F channels of the group's s     (B, C + F, ...)
    backward         dx_i = grad_i + g / P  d_i / (N sigma)          g: sum of grad over all that s was written to
    jvp              t_i, then F channels of mean_P q / sigma        q = sum_i c_i d_i / N
    double_backward  gg  = jvp(v, x)
                     gx_i = g / P (c_i / (N sigma) - q d_i / (N sigma^3))

B samples make ``groups`` groups whose sizes differ by one at most, larger ones first. ``strided``: sample n is in group n mod
``groups``; else groups are runs of samples. Where sigma is 0, which takes eps = 0, its derivatives count as 0.

Results are channels_last where x is, and contiguous otherwise.
"""

import torch
from torch import Tensor

from fastgan._dtypes import accumulate_dtype
from fastgan.ops._closed import declare_closed


def memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def like_x(x: Tensor, *_) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def like_output(x: Tensor, groups, strided, num_channels, *_) -> Tensor:
    shape = x.shape[0], x.shape[1] + num_channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def check(
    x: Tensor, groups: int, num_channels: int, unbiased: bool, *, v: Tensor | None = None, grad: Tensor | None = None
) -> None:
    if x.dim() < 2 or num_channels < 1 or x.shape[1] < 1 or x.shape[1] % num_channels:
        raise ValueError(
            f"minibatch_stddev: x has shape {tuple(x.shape)}, expected (B, C, ...) with C a multiple of "
            f"num_channels={num_channels}"
        )
    if groups < 1 or 0 < x.shape[0] < groups * (1 + unbiased):
        raise ValueError(
            f"minibatch_stddev: groups is {groups} for a batch of {x.shape[0]}, expected groups of {1 + unbiased} or more"
        )
    for name, z, extra in (("v", v, 0), ("grad", grad, num_channels)):
        expected = x.shape[0], x.shape[1] + extra, *x.shape[2:]
        if z is not None and (z.shape != expected or z.dtype != x.dtype):
            raise ValueError(
                f"minibatch_stddev: {name} has shape {tuple(z.shape)} and {z.dtype}, expected {tuple(expected)} and {x.dtype}"
            )


def _grouped(x: Tensor, groups: int, strided: bool):
    """Views of the samples of each group."""
    return [x[first::groups] for first in range(groups)] if strided else x.tensor_split(groups)


def _centred(x: Tensor, num_channels: int) -> Tensor:
    """(n, C, ...) as deviations (n, F, P). From one sample before from the mean: equal samples give 0 without rounding."""
    x = x.to(accumulate_dtype(x.dtype)).reshape(x.shape[0], num_channels, -1)
    x = x - x[:1]
    return x - x.mean(0)


class _Group:
    """What the formulas need of a group's samples x (n, C, ...)."""

    def __init__(self, x: Tensor, num_channels: int, unbiased: bool, eps: float):
        self.shape, self.rest = x.shape, (1,) * (x.dim() - 2)
        self.d = _centred(x, num_channels)
        self.count = max(1, x.shape[0] - unbiased)
        self.sigma = (self.d.square().sum(0) / self.count + eps).sqrt()
        self.inverse = torch.where(self.sigma == 0, 0.0, 1 / self.sigma)

    def channels(self, statistic: Tensor) -> Tensor:
        """(F, P) averaged, as what broadcasts over the channels appended."""
        return statistic.mean(1).view(-1, *self.rest)

    def weight(self, grad: Tensor) -> Tensor:
        """g / P / (N sigma), (F, P), for the gradient grad (n, F, ...) of the channels appended."""
        g = grad.to(self.d.dtype).reshape(*grad.shape[:2], -1).sum(2).sum(0)
        return (g / (self.sigma[0].numel() * self.count))[:, None] * self.inverse

    def covariance(self, c: Tensor) -> Tensor:
        return (c * self.d).sum(0) / self.count


def forward_reference(x, groups, strided, num_channels, unbiased, eps):
    return jvp_reference(x, x, groups, strided, num_channels, unbiased, eps, lambda group, _: group.sigma)


def jvp_reference(t, x, groups, strided, num_channels, unbiased, eps, statistic=None):
    check(x, groups, num_channels, unbiased, v=t)
    statistic = statistic or (lambda group, t: group.covariance(_centred(t, num_channels)) * group.inverse)
    out = like_output(x, groups, strided, num_channels)
    if out.numel():
        for tg, xg, og in zip(*(_grouped(z, groups, strided) for z in (t, x, out)), strict=True):
            group = _Group(xg, num_channels, unbiased, eps)
            og[:, : x.shape[1]] = tg
            og[:, x.shape[1] :] = group.channels(statistic(group, tg))
    return out


def backward_reference(grad, x, groups, strided, num_channels, unbiased, eps):
    check(x, groups, num_channels, unbiased, grad=grad)
    out = like_x(x)
    if out.numel():
        for gg, xg, og in zip(*(_grouped(z, groups, strided) for z in (grad, x, out)), strict=True):
            group = _Group(xg, num_channels, unbiased, eps)
            own, appended = gg.split([x.shape[1], num_channels], 1)
            og.copy_(own + (group.weight(appended) * group.d).view(xg.shape))
    return out


def double_backward_reference(v, grad, x, groups, strided, num_channels, unbiased, eps):
    check(x, groups, num_channels, unbiased, v=v, grad=grad)
    along_grad = jvp_reference(v, x, groups, strided, num_channels, unbiased, eps)
    out = like_x(x)
    if out.numel():
        for vg, gg, xg, og in zip(*(_grouped(z, groups, strided) for z in (v, grad, x, out)), strict=True):
            group = _Group(xg, num_channels, unbiased, eps)
            c = _centred(vg, num_channels)
            slope = group.covariance(c) * group.inverse.square()
            og.copy_((group.weight(gg[:, x.shape[1] :]) * (c - slope * group.d)).view(xg.shape))
    return along_grad, out


forward, backward, jvp, double_backward = declare_closed(
    "minibatch_stddev",
    "int groups, bool strided, int num_channels, bool unbiased, float eps",
    references=(forward_reference, backward_reference, jvp_reference, double_backward_reference),
    like_output=like_output,
    like_input=like_x,
)
