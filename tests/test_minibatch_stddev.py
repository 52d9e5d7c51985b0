"""What users of minibatch standard deviation rely on: the peers' formulas, remainders, layouts, ranks, errors, the layer."""

import copy
import functools
import pickle

import pytest
import torch
from ranks import assert_as_one_process, on_ranks
from samples import instruction_sets, map_tensors
from torch import nn

import fastgan
from fastgan import minibatch_stddev
from fastgan.backends import extension
from fastgan.nn import MinibatchStdDev
from fastgan.ops import references

native = pytest.mark.skipif(not extension.loaded, reason="fastgan._C is not built")


def stylegan(x, group_size=4, num_channels=1):
    """StyleGAN2-ADA and 3, their layer's arithmetic written again."""
    b, c, h, w = x.shape
    g = b if group_size is None else min(group_size, b)
    y = x.reshape(g, b // g, num_channels, c // num_channels, h, w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([2, 3, 4])
    return torch.cat([x, y[:, :, None, None].repeat(g, 1, h, w)], 1)


def gan_zoo(x, group_size=4):
    """pytorch_GAN_zoo: runs of samples, unbiased, the whole batch where they don't divide, zeros for one sample."""
    b, _, h, w = x.shape
    g = min(b, group_size)
    g = b if b % g else g
    if g == 1:
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    y = (torch.var(x.reshape(b // g, g, -1), 1) + 1e-8).sqrt().mean(1)
    return torch.cat([x, y.repeat_interleave(g)[:, None, None, None].expand(b, 1, h, w)], 1)


def tfgan(x):
    """tfgan and progressive GANs: the whole batch, nothing added to the variance."""
    y = x.var(0, unbiased=False).sqrt().mean()
    return torch.cat([x, y.expand(x.shape[0], 1, *x.shape[2:])], 1)


def zoo_options(group_size=4):
    return {"group_size": group_size, "layout": "contiguous", "unbiased": True, "remainder": "whole"}


def some(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_to_second_order(ours, theirs, x, tolerance=1e-10):
    """Values, gradients, and the gradient of a gradient penalty."""
    results = []
    for function in (ours, theirs):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        weight = some(*y.shape, dtype=x.dtype, seed=1)
        (first,) = torch.autograd.grad((y.square() * weight).sum(), leaf, create_graph=True)
        results.append((y, first, *torch.autograd.grad(first.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The peers


@pytest.mark.parametrize("num_channels", [1, 2, 6])
@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 100, None])
def test_stylegan(backend, group_size, num_channels):
    assert_same_to_second_order(
        lambda x: minibatch_stddev(x, group_size=group_size, num_channels=num_channels),
        lambda x: stylegan(x, group_size, num_channels),
        some(8, 6, 3, 5),
        1e-9,
    )


@pytest.mark.parametrize(("batch", "group_size"), [(8, 4), (8, 2), (9, 3), (10, 4), (7, 4), (3, 4)])
def test_gan_zoo(backend, batch, group_size):
    x = some(batch, 5, 3, 3)
    assert_same_to_second_order(lambda x: minibatch_stddev(x, **zoo_options(group_size)), lambda x: gan_zoo(x, group_size), x)


@pytest.mark.parametrize(("batch", "group_size"), [(1, 4), (5, 1)])
def test_gan_zoo_gives_zeros_for_groups_of_one(batch, group_size):
    x = some(batch, 5, 3, 3).requires_grad_()
    y = minibatch_stddev(x, **zoo_options(group_size))
    assert torch.equal(y, gan_zoo(x, group_size))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_whole_batch_without_eps(backend):
    assert_same_to_second_order(lambda x: minibatch_stddev(x, group_size=None, eps=0.0), tfgan, some(6, 4, 2, 3))


def test_last_partial_batches_make_even_groups_no_smaller_than_asked(backend):
    x = some(11, 4, 2, 2)
    y = minibatch_stddev(x)
    for first in range(2):  # 6 and 5 samples
        torch.testing.assert_close(y[first::2], stylegan(x[first::2], None))
    y = minibatch_stddev(x, layout="contiguous", group_size=3)
    for part, whole in zip(x.split((4, 4, 3)), y.split((4, 4, 3)), strict=True):
        torch.testing.assert_close(whole, stylegan(part, None))
    torch.testing.assert_close(minibatch_stddev(x, remainder="whole"), stylegan(x, None))


def test_one_sample_and_none(backend):
    x = some(1, 4, 2, 2)
    torch.testing.assert_close(minibatch_stddev(x), stylegan(x))
    empty = torch.zeros(0, 4, 2, 2, requires_grad=True)
    y = minibatch_stddev(empty, num_channels=2)
    assert y.shape == (0, 6, 2, 2)
    y.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("rest", [(), (7,), (3, 5), (2, 3, 4)])
def test_any_number_of_places(backend, rest):
    x = some(8, 6, *rest)
    y = minibatch_stddev(x, num_channels=2)
    expected = stylegan(x.reshape(8, 6, -1, 1), num_channels=2)
    torch.testing.assert_close(y.reshape(8, 8, -1, 1), expected)


# Numbers


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5])
@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_identical_samples_are_finite_to_second_order(backend, batch, value, eps):
    x = torch.full((batch, 4, 3, 3), value, requires_grad=True)
    y = minibatch_stddev(x, eps=eps)
    torch.testing.assert_close(y[:, 4:], torch.full_like(y[:, 4:], eps**0.5), rtol=1e-6, atol=0)
    (first,) = torch.autograd.grad(y[:, 4:].sum(), x, create_graph=True)
    assert torch.equal(first, torch.zeros_like(first))
    (second,) = torch.autograd.grad((first * some(*x.shape, dtype=x.dtype)).sum(), x)
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(backend, dtype):
    """1e-8 is 0 in float16, and the square of 300 is infinite there."""
    same = torch.zeros(4, 4, 3, 3, dtype=dtype, requires_grad=True)
    y = minibatch_stddev(same)
    y.sum().backward()
    torch.testing.assert_close(y[:, 4:], torch.full_like(y[:, 4:], 1e-4), rtol=1e-2, atol=0)
    assert same.grad.isfinite().all()
    large = (some(4, 4, 3, 3) * 1000).to(dtype)
    y = minibatch_stddev(large)
    assert y.dtype == dtype
    torch.testing.assert_close(y, stylegan(large.double()).to(dtype))


def test_offsets_cost_no_digits(backend):
    x = some(8, 4, 3, 3, dtype=torch.float32) / 64 + 1000
    torch.testing.assert_close(minibatch_stddev(x).double(), stylegan(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_spoils_its_group_and_slice_alone(backend, bad):
    x = some(8, 4, 3, 3)
    x[1, 3, 0, 0] = bad  # samples 1, 3, 5, 7; the second slice
    appended = minibatch_stddev(x, num_channels=2)[:, 4:]
    spoilt = torch.zeros_like(appended, dtype=torch.bool)
    spoilt[1::2, 1] = True
    assert torch.equal(appended.isnan(), spoilt)


# Layouts


def channels_last(x):
    return x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
@pytest.mark.parametrize("rest", [(3, 5), (2, 3, 3)])
def test_channels_last_stays(backend, poisoned, rest, num_channels, dtype):
    x = some(9, 6, *rest, dtype=dtype)
    y, last = (minibatch_stddev(z, num_channels=num_channels) for z in (x, channels_last(x)))
    torch.testing.assert_close(last, y, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert last.stride() == torch.cat([channels_last(x), channels_last(y[:, 6:])], 1).stride()
    if dtype == torch.float64:
        assert_same_to_second_order(
            lambda x: minibatch_stddev(x, num_channels=num_channels),
            lambda x: minibatch_stddev(x.contiguous(), num_channels=num_channels),
            channels_last(x),
        )


def test_other_layouts(backend):
    x = some(8, 6, 4, 5)
    wide = some(8, 6, 4, 10)
    for view in (x.transpose(2, 3), wide[..., ::2], x[:1].expand(8, -1, -1, -1), x[::2], x.flip(0), channels_last(x)[1:6]):
        torch.testing.assert_close(minibatch_stddev(view, group_size=2), minibatch_stddev(view.clone(), group_size=2))
        assert minibatch_stddev(view, group_size=None).is_contiguous() == (
            not view.is_contiguous(memory_format=torch.channels_last)
        )


@native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_kernels_copy_no_input(layout):
    x, grad = (some(8, c, 3, 5).to(memory_format=layout) for c in (6, 8))
    form = 2, True, 2, False, 1e-8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.fastgan.minibatch_stddev(x, *form)
        torch.ops.fastgan.minibatch_stddev_backward(grad, x, *form)
        torch.ops.fastgan.minibatch_stddev_jvp(x, x, *form)
        torch.ops.fastgan.minibatch_stddev_double_backward(x, grad, x, *form)
    ran = {event.key for event in profile.key_averages()}
    assert "fastgan::minibatch_stddev_double_backward" in ran
    assert not ran & {"aten::copy_", "aten::clone", "aten::contiguous"}


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_and_every_rest_of_a_vector(dtype):
    import fastgan._C as C

    before = C.isa()
    try:
        for level in instruction_sets():
            C.set_isa(level)
            for batch, length in [(b, n) for b in (4, 5) for n in (*range(1, 20), 63, 65, 4097)]:
                form = 1, True, 1, False, 0.1
                x, v = (some(batch, length, 1, dtype=dtype, seed=seed) for seed in range(2))
                grad = some(batch, length + 1, 1, dtype=dtype, seed=2)
                for suffix, tensors in (
                    ("", (x,)),
                    ("_backward", (grad, x)),
                    ("_jvp", (v, x)),
                    ("_double_backward", (v, grad, x)),
                ):
                    name = "minibatch_stddev" + suffix
                    ours = getattr(torch.ops.fastgan, name)(*tensors, *form)
                    theirs = map_tensors(
                        lambda z: z.to(dtype), references[name](*map_tensors(torch.Tensor.double, tensors), *form)
                    )
                    torch.testing.assert_close(ours, theirs)
    finally:
        C.set_isa(before)


# Inside a critic


def critic(group=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.SiLU(), MinibatchStdDev(4, 2, group=group), nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(18, 1)
    ).double()


def test_r1_through_the_layer(backend):
    class Peer(nn.Module):
        def forward(self, x):
            return stylegan(x, 4, 2)

    x = some(8, 3, 7, 7)
    ours, theirs = critic(), critic()
    theirs[2] = Peer()
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        g.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_torch_func_and_compile(backend):
    x, direction = some(8, 4, 3, 3), some(8, 4, 3, 3, seed=2)
    tangents = [torch.func.jvp(f, (x,), (direction,))[1] for f in (minibatch_stddev, stylegan)]
    torch.testing.assert_close(*tangents)

    def penalty(x):
        return torch.func.grad(lambda y: minibatch_stddev(y).square().sum())(x).square().sum()

    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(penalty(leaf), leaf)
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


def test_compile_with_channels_last(backend):
    torch._dynamo.reset()
    x = channels_last(some(8, 4, 3, 3))
    compiled = torch.compile(lambda x: minibatch_stddev(x, num_channels=2), fullgraph=True, backend="aot_eager")(x)
    assert compiled.stride() == minibatch_stddev(x, num_channels=2).stride()
    torch.testing.assert_close(compiled, stylegan(x, 4, 2))


# Ranks


def _across_ranks(rank, counts):
    stddev = functools.partial(minibatch_stddev, group_size=4, num_channels=2)
    assert_as_one_process(rank, counts, some(sum(counts), 4, 3, 3), lambda x, group: stddev(x, group=group))


@pytest.mark.parametrize("counts", [(4, 4), (6, 5), (8, 0)])
def test_groups_across_ranks(counts):
    on_ranks(_across_ranks, counts)


def test_group_without_torch_distributed():
    with pytest.raises(RuntimeError, match=r"minibatch_stddev: x: group was given but torch.distributed is not initialised"):
        minibatch_stddev(some(4, 2, 1, 1), group="world")


# Errors


@pytest.mark.parametrize(
    ("value", "options", "error", "words"),
    [
        ([[1.0]], {}, TypeError, ["x is a list", "(B, C, ...)"]),
        (torch.zeros(4), {}, ValueError, ["x has 1 dimensions (4,)", "expected 2 or more: (B, C, ...)"]),
        (torch.zeros(4, 2, dtype=torch.int64), {}, TypeError, ["x has dtype torch.int64", "x.float()"]),
        (torch.zeros(4, 6, 2, 2), {"num_channels": 4}, ValueError, ["x has 6 channels (4, 6, 2, 2)", "divides 6"]),
        (torch.zeros(4, 0, 2, 2), {}, ValueError, ["x has 0 channels"]),
        (torch.zeros(4, 6), {"group_size": 0}, ValueError, ["group_size is 0", "None for the whole batch"]),
        (torch.zeros(4, 6), {"num_channels": 0}, ValueError, ["num_channels is 0", "positive integer"]),
        (torch.zeros(4, 6), {"layout": "blocks"}, ValueError, ["layout is 'blocks'", "'strided', 'contiguous'"]),
        (torch.zeros(4, 6), {"remainder": "drop"}, ValueError, ["remainder is 'drop'", "'even', 'whole'"]),
        (torch.zeros(4, 6), {"eps": -1.0}, ValueError, ["eps is -1.0", "0 or more"]),
    ],
)
def test_errors_name_argument_value_expectation_and_way_out(value, options, error, words):
    with pytest.raises(error) as raised:
        minibatch_stddev(value, **options)
    for word in ["minibatch_stddev", *words]:
        assert word in str(raised.value)


def test_operators_refuse_what_would_read_past_the_end(backend):
    x, form = some(8, 6, 3, 3), (2, True, 2, False, 1e-8)
    minibatch_stddev(x)
    ops = torch.ops.fastgan
    for grad in (some(8, 7, 3, 3), some(7, 8, 3, 3), some(8, 8, 9), some(8, 8, 3, 3, dtype=torch.float32)):
        with pytest.raises((RuntimeError, ValueError)):
            ops.minibatch_stddev_backward(grad, x, *form)
    with pytest.raises((RuntimeError, ValueError)):
        ops.minibatch_stddev_jvp(x[1:], x, *form)
    for bad in ((0, True, 2, False, 1e-8), (9, True, 2, False, 1e-8), (8, True, 2, True, 1e-8), (2, True, 4, False, 1e-8)):
        with pytest.raises((RuntimeError, ValueError)):
            ops.minibatch_stddev(x, *bad)


# The layer


def test_layer_is_the_function_and_has_no_state(backend):
    layer, x = MinibatchStdDev(2, 3, layout="contiguous", unbiased=True, eps=1e-4), some(8, 6, 3, 3)
    expected = minibatch_stddev(x, group_size=2, num_channels=3, layout="contiguous", unbiased=True, eps=1e-4)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    assert (layer.group_size, layer.num_channels) == (2, 3)
    assert not list(layer.parameters()) and not list(layer.buffers()) and not layer.state_dict()
    assert repr(MinibatchStdDev()).startswith("MinibatchStdDev(group_size=4, num_channels=1, layout='strided'")
    assert (MinibatchStdDev().group_size, MinibatchStdDev(None).group_size) == (4, None)


def test_layer_checks_its_options():
    for options in ({"group_size": -1}, {"num_channels": 1.5}, {"layout": 1}):
        with pytest.raises(ValueError, match=f"MinibatchStdDev: {next(iter(options))} is"):
            MinibatchStdDev(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    model, x = critic().float(), some(4, 3, 7, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = model(x)
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)


def test_meta_device():
    assert MinibatchStdDev(4, 2)(torch.zeros(8, 6, 3, 3, device="meta")).shape == (8, 8, 3, 3)


def test_exported_names():
    assert fastgan.functional.minibatch_stddev is fastgan.minibatch_stddev
    assert fastgan.nn.MinibatchStdDev is MinibatchStdDev
