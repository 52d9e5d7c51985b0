"""Minibatch standard deviation in Triton: fastgan/ops/minibatch_stddev.py has the formulas.

A program owns a piece of the positions of one slice of channels in one group and goes through the group's samples three times:
for the mean, for the deviation, and for what is written. Groups of up to _KEEP samples stay in registers meanwhile; of larger
ones only the first time reads past the caches. Another launch adds up the
pieces in order and writes the channels appended; with a gradient, one before sums up what reached these. No atomics: the same
bits on every run.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.rows import rows_lie
from fastgan.ops.minibatch_stddev import check, like_output, like_x, memory_format

_KEEP = 8
_BLOCK = 256  # positions of a program, and places at a time where channels appended are read or written


@triton.jit
def place_of(batch, groups, units, STRIDED: tl.constexpr):
    """This program's group and unit in it; the group's first sample, step and size."""
    group, unit = tl.program_id(0) // units, tl.program_id(0) % units
    first, step, size = group, groups, batch // groups + (group < batch % groups).to(tl.int32)
    if not STRIDED:
        first, step = group * (batch // groups) + tl.minimum(group, batch % groups), 1
    return group, unit, first.to(tl.int64), step, size


@triton.jit
def _load(values, sample, stride, inside, WANTED: tl.constexpr):
    """Of a sample, at this program's positions; anything where there is no such tensor."""
    return tl.load(values + sample * stride, mask=inside, other=0) if WANTED else 0


@triton.jit
def _kept(values, first, step, size, stride, at, positions, WANTED: tl.constexpr, KEEP: tl.constexpr):
    """Of all samples of a group, in registers; 0 where it has fewer than KEEP."""
    kept = ()
    for i in tl.static_range(KEEP):
        kept += (_load(values, first + i * step, stride, at < tl.where(i < size, positions, 0), WANTED),)
    return kept


@triton.jit
def _add_deviations(squares, products, value, value_v, x0, v0, mean, mean_v, TANGENT: tl.constexpr, ACC: tl.constexpr):
    d = value.to(ACC) - x0 - mean
    squares += d * d
    if TANGENT:
        products += (value_v.to(ACC) - v0 - mean_v) * d
    return squares, products


@triton.jit
def _gradient(value, value_v, g, x0, v0, mean, mean_v, weight, slope, TANGENT: tl.constexpr, ACC: tl.constexpr):
    d = value.to(ACC) - x0 - mean
    if TANGENT:
        result = weight * (value_v.to(ACC) - v0 - mean_v - slope * d)
    else:
        result = g.to(ACC) + weight * d
    return result


@triton.jit
def column_kernel(
    x, v, grad, reached, out_values, out_gradient, out_parts,
    batch, groups, slices, pieces, positions, length,  # length of the runs of memory that a slice's positions are
    x_sample, x_run, x_slice, v_sample, v_run, v_slice, grad_sample, grad_run, grad_slice,
    values_sample, values_run, values_slice, gradient_sample, gradient_run, gradient_slice,
    eps: tl.float64,
    STRIDED: tl.constexpr, UNBIASED: tl.constexpr, TANGENT: tl.constexpr, WEIGHTS: tl.constexpr, VALUES: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    group, unit, first, step, size = place_of(batch, groups, slices * pieces, STRIDED)
    of_slice, piece = (unit // pieces).to(tl.int64), unit % pieces
    at = piece * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    run, lane = (at // length).to(tl.int64), at % length
    xs = x + of_slice * x_slice + run * x_run + lane
    vs = v + of_slice * v_slice + run * v_run + lane
    grads = grad + of_slice * grad_slice + run * grad_run + lane
    outs = out_values + of_slice * values_slice + run * values_run + lane
    gradients = out_gradient + of_slice * gradient_slice + run * gradient_run + lane
    kept = _kept(xs, first, step, size, x_sample, at, positions, True, KEEP)
    kept_v = _kept(vs, first, step, size, v_sample, at, positions, TANGENT, KEEP)
    x0 = kept[0].to(ACC) if KEEP else _load(xs, first, x_sample, inside, True).to(ACC)
    v0 = x0
    if TANGENT:
        v0 = kept_v[0].to(ACC) if KEEP else _load(vs, first, v_sample, inside, True).to(ACC)
    mean, mean_v = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    squares, products = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if KEEP:
        for i in tl.static_range(KEEP):
            mean += tl.where(i < size, kept[i].to(ACC) - x0, 0)
            if TANGENT:
                mean_v += tl.where(i < size, kept_v[i].to(ACC) - v0, 0)
            if VALUES:
                passed = kept_v[i] if TANGENT else kept[i]
                tl.store(outs + (first + i * step) * values_sample, passed, mask=at < tl.where(i < size, positions, 0))
        mean = mean / size.to(ACC)
        mean_v = mean_v / size.to(ACC)
        for i in tl.static_range(KEEP):
            more, more_products = _add_deviations(squares, products, kept[i], kept_v[i], x0, v0, mean, mean_v, TANGENT, ACC)
            squares, products = tl.where(i < size, more, squares), tl.where(i < size, more_products, products)
    else:
        for i in range(size):
            value = _load(xs, first + i * step, x_sample, inside, True)
            mean += value.to(ACC) - x0
            if TANGENT:
                value = _load(vs, first + i * step, v_sample, inside, True)
                mean_v += value.to(ACC) - v0
            if VALUES:
                tl.store(outs + (first + i * step) * values_sample, value, mask=inside)
        mean = mean / size.to(ACC)
        mean_v = mean_v / size.to(ACC)
        for i in range(size):
            value = _load(xs, first + i * step, x_sample, inside, True)
            value_v = _load(vs, first + i * step, v_sample, inside, TANGENT)
            squares, products = _add_deviations(squares, products, value, value_v, x0, v0, mean, mean_v, TANGENT, ACC)
    count = (size - 1 if UNBIASED else size).to(ACC)
    sigma = tl.sqrt(squares / count + (tl.zeros([BLOCK], tl.float64) + eps).to(ACC))
    inverse = tl.where(sigma == 0, 0, 1 / sigma)
    statistic = products / count * inverse if TANGENT else sigma
    if VALUES:
        tl.store(out_parts + tl.program_id(0), tl.sum(tl.where(inside, statistic, 0).to(tl.float64), 0))
    if WEIGHTS:
        arriving = tl.load(reached + group * slices + of_slice)
        weight = (arriving / (count.to(tl.float64) * positions)).to(ACC) * inverse
        slope = statistic * inverse
        if KEEP:
            for i in tl.static_range(KEEP):
                there, sample = at < tl.where(i < size, positions, 0), first + i * step
                g = _load(grads, sample, grad_sample, there, not TANGENT)
                value = _gradient(kept[i], kept_v[i], g, x0, v0, mean, mean_v, weight, slope, TANGENT, ACC)
                tl.store(gradients + sample * gradient_sample, value, mask=there)
        else:
            for i in range(size):
                sample = first + i * step
                value, value_v = _load(xs, sample, x_sample, inside, True), _load(vs, sample, v_sample, inside, TANGENT)
                g = _load(grads, sample, grad_sample, inside, not TANGENT)
                value = _gradient(value, value_v, g, x0, v0, mean, mean_v, weight, slope, TANGENT, ACC)
                tl.store(gradients + sample * gradient_sample, value, mask=inside)


@triton.jit
def reached_kernel(
    grad, out, batch, groups, slices, places, sample_stride, channel_stride, place_stride,
    STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[group, slice] = sum of grad over the group's samples and the places of the slice's channel."""
    group, of_slice, first, step, size = place_of(batch, groups, slices, STRIDED)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(size):
        row = grad + (first + i * step) * sample_stride + of_slice.to(tl.int64) * channel_stride
        for start in range(0, places, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(row + at.to(tl.int64) * place_stride, mask=at < places, other=0).to(tl.float64)
    tl.store(out + group * slices + of_slice, tl.sum(total, 0))


@triton.jit
def append_kernel(
    parts, out, batch, groups, slices, pieces, positions, places, sample_stride, channel_stride, place_stride,
    STRIDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the slice's channel of the group's samples with the sum of its pieces over the number of positions."""
    group, of_slice, first, step, size = place_of(batch, groups, slices, STRIDED)
    total = tl.zeros([BLOCK], tl.float64)
    row_of_parts = parts + (group * slices + of_slice).to(tl.int64) * pieces
    for start in range(0, pieces, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(row_of_parts + at, mask=at < pieces, other=0)
    value = (tl.zeros([BLOCK], tl.float64) + tl.sum(total, 0) / positions).to(ACC)
    for i in range(size):
        row = out + (first + i * step) * sample_stride + of_slice.to(tl.int64) * channel_stride
        for start in range(0, places, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(row + at.to(tl.int64) * place_stride, value.to(out.dtype.element_ty), mask=at < places)


@functools.lru_cache(maxsize=256)
def _strides(shape: torch.Size, last: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=last).stride()


class _Samples:
    """A tensor (B, C or C + F, ...) whose samples lie in the problem's order, which ``like`` has."""

    def __init__(self, z: Tensor, last: torch.memory_format, width: int):
        self.places = z[0, 0].numel()
        self.channel, self.place = (1, z.shape[1]) if last != torch.contiguous_format else (self.places, 1)
        self.tensor = z if rows_lie(z, _strides(z.shape, last)) else z.contiguous(memory_format=last)
        self.strides = self.tensor.stride(0), self.place, self.channel * width

    def channels_from(self, channel: int) -> Tensor:
        """Where this channel begins; for a kernel that goes by ``by``."""
        return self.tensor[:, channel:]

    @property
    def by(self) -> tuple[int, int, int]:
        return self.tensor.stride(0), self.channel, self.place


def _run(x, v, grad, groups, strided, num_channels, unbiased, eps):
    """The output like grad, None for a backward, and that like x, None without a grad."""
    check(x, groups, num_channels, unbiased, v=v, grad=grad)
    values = None if grad is not None and v is None else like_output(x, groups, strided, num_channels)
    gradient = None if grad is None else like_x(x)
    if x.numel() == 0:
        return values, gradient
    last, width = memory_format(x), x.shape[1] // num_channels
    xs = _Samples(x, last, width)
    vs, grads, outs, gradients = (xs if z is None else _Samples(z, last, width) for z in (v, grad, values, gradient))
    positions = width * xs.places
    accumulate = tl.float64 if x.dtype == torch.float64 else tl.float32
    largest = triton.cdiv(x.shape[0], groups)
    pieces, slices = triton.cdiv(positions, _BLOCK), groups * num_channels
    reached = x.new_empty(slices, dtype=torch.float64)
    parts = x.new_empty(slices * pieces, dtype=torch.float64)
    with torch.cuda.device_of(x):
        if grad is not None:
            reached_kernel[(slices,)](
                grads.channels_from(x.shape[1]), reached, x.shape[0], groups, num_channels, xs.places, *grads.by,
                STRIDED=strided, BLOCK=_BLOCK,
            )  # fmt: skip
        column_kernel[(slices * pieces,)](
            xs.tensor, vs.tensor, grads.tensor, reached, outs.tensor, gradients.tensor, parts,
            x.shape[0], groups, num_channels, pieces, positions, positions if last == torch.contiguous_format else width,
            *xs.strides, *vs.strides, *grads.strides, *outs.strides, *gradients.strides, float(eps),
            STRIDED=strided, UNBIASED=unbiased, TANGENT=v is not None, WEIGHTS=grad is not None, VALUES=values is not None,
            ACC=accumulate, BLOCK=_BLOCK, KEEP=largest if largest <= _KEEP else 0,
        )  # fmt: skip
        if values is not None:
            append_kernel[(slices,)](
                parts, outs.channels_from(x.shape[1]), x.shape[0], groups, num_channels, pieces, positions, xs.places, *outs.by,
                STRIDED=strided, ACC=accumulate, BLOCK=_BLOCK,
            )  # fmt: skip
    return values, gradient


def minibatch_stddev(x: Tensor, *form) -> Tensor:
    return _run(x, None, None, *form)[0]


def minibatch_stddev_backward(grad: Tensor, x: Tensor, *form) -> Tensor:
    return _run(x, None, grad, *form)[1]


def minibatch_stddev_jvp(t: Tensor, x: Tensor, *form) -> Tensor:
    return _run(x, t, None, *form)[0]


def minibatch_stddev_double_backward(v: Tensor, grad: Tensor, x: Tensor, *form) -> tuple[Tensor, Tensor]:
    return _run(x, v, grad, *form)
