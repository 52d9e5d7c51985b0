"""What users of minibatch discrimination rely on: the function, its errors, the layer and its conventions."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import fastgan
from fastgan import minibatch_discrimination
from fastgan.nn import MinibatchDiscrimination


def textbook(m, self_term=True):
    e = torch.exp(-(m[:, None] - m[None]).abs().sum(-1))
    return e.sum(1) if self_term else e.sum(1) - 1


def some_m(b=9, k=4, d=3, dtype=torch.float64, seed=0):
    return torch.randn(b, k, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)) / d


# The function


@pytest.mark.parametrize("self_term", [True, False])
def test_textbook_formula(backend, self_term):
    m = some_m().requires_grad_()
    ours, theirs = minibatch_discrimination(m, self_term=self_term), textbook(m, self_term)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((f * weight).sum(), m)[0] for f in (ours, theirs)), rtol=1e-11, atol=1e-12)


def test_without_self_term_keeps_what_subtracting_one_loses(backend):
    m = torch.tensor([[[0.0]], [[30.0]]])
    near_zero = minibatch_discrimination(m, self_term=False)
    torch.testing.assert_close(near_zero, torch.full((2, 1), -30.0).exp(), rtol=1e-5, atol=0)
    assert (minibatch_discrimination(m) - 1).abs().max() == 0  # what float32 leaves of it


def test_permuting_samples_permutes_rows(backend):
    m, order = some_m(37, 3, 5), torch.randperm(37, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(minibatch_discrimination(m)[order], minibatch_discrimination(m[order]), rtol=1e-12, atol=1e-12)


def test_far_samples_underflow_to_zero_not_nan(backend):
    m = torch.tensor([[[0.0, 0.0]], [[1e4, -1e4]], [[-3e38, 3e38]]], requires_grad=True)
    f = minibatch_discrimination(m)
    assert torch.equal(f, torch.ones(3, 1))
    f.sum().backward()
    assert torch.equal(m.grad, torch.zeros_like(m))


def test_duplicates_have_no_gradient_between_them(backend):
    m = torch.zeros(5, 2, 3, requires_grad=True)
    f = minibatch_discrimination(m)
    assert torch.equal(f, torch.full((5, 2), 5.0))
    f.square().sum().backward()
    assert torch.equal(m.grad, torch.zeros_like(m))


def test_one_sample(backend):
    m = some_m(1).requires_grad_()
    assert torch.equal(minibatch_discrimination(m), torch.ones(1, 4, dtype=m.dtype))
    minibatch_discrimination(m, self_term=False).sum().backward()
    assert torch.equal(m.grad, torch.zeros_like(m))


def test_half_precision_accumulates_in_float32(backend):
    m = torch.zeros(300, 1, 1, dtype=torch.bfloat16)  # bfloat16 alone stops counting at 256
    assert minibatch_discrimination(m).float().min() > 290


def penalised(function, m, weight):
    """A gradient penalty through the layer: differentiates it twice."""
    x = m.detach().clone().requires_grad_()
    w = weight.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad((function(x * w) * torch.arange(1.0, 1 + m.shape[1])).sum(), x, create_graph=True)
    ((g.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
    return w.grad


def test_gradient_penalty_through_it(backend):
    m, weight = some_m(), torch.full((3,), 1.5, dtype=torch.float64)
    torch.testing.assert_close(
        penalised(minibatch_discrimination, m, weight), penalised(textbook, m, weight), rtol=1e-10, atol=1e-12
    )


def test_jvp_form_of_a_penalty(backend):
    """First order through a forward-mode derivative, the backward pass taken outside the dual level."""
    m, direction = some_m(), some_m(seed=3)

    def by(function):
        w = torch.full((3,), 1.5, dtype=torch.float64, requires_grad=True)
        _, tangent = torch.func.jvp(lambda x: function(x * w), (m,), (direction,))
        return torch.autograd.grad(tangent.square().sum(), w)[0]

    torch.testing.assert_close(by(minibatch_discrimination), by(textbook), rtol=1e-10, atol=1e-12)


def test_torch_func_inside_compile(backend):
    m = some_m()

    def penalty(x):
        return torch.func.grad(lambda y: minibatch_discrimination(y).square().sum())(x).square().sum()

    torch._dynamo.reset()
    x = m.clone().requires_grad_()
    expected = torch.autograd.grad(penalty(x), x)[0]
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    layer, x = MinibatchDiscrimination(6, 4, 3, init_std=0.1), torch.randn(8, 6)
    with torch.autocast("cpu", dtype):
        out = layer(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    assert layer.T.grad.dtype == torch.float32


# Errors


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([[1.0]], TypeError, ["m is a list", "torch.Tensor"]),
        (torch.zeros(4, 6), ValueError, ["m has 2 dimensions (4, 6)", "(B, K, D)", ".view(B, K, D)"]),
        (torch.zeros(2, 2, 2, 2), ValueError, ["m has 4 dimensions", "(B, K, D)"]),
        (torch.zeros(2, 2, 2, dtype=torch.int64), TypeError, ["m has dtype torch.int64", "m.float()"]),
        (torch.zeros(2, 2, 2, dtype=torch.complex64), TypeError, ["m has dtype torch.complex64"]),
    ],
)
def test_errors_name_argument_value_expectation_and_way_out(value, error, words):
    with pytest.raises(error) as raised:
        minibatch_discrimination(value)
    for word in ["minibatch_discrimination", *words]:
        assert word in str(raised.value)


def test_mismatched_gradients_are_refused(backend):
    m = some_m(dtype=torch.float32)
    minibatch_discrimination(m)
    for grad in (torch.ones(9, 3), torch.ones(8, 4), torch.ones(9, 4, 1)):
        with pytest.raises(RuntimeError):
            torch.ops.fastgan.minibatch_discrimination_backward(grad, m)


def test_group_without_torch_distributed():
    with pytest.raises(RuntimeError, match=r"m: group was given but torch.distributed is not initialised.*torchrun"):
        minibatch_discrimination(some_m(), group="world")


# The layer


class TorchganLayer(nn.Module):
    """The widely used formulation: T normal(0, 1), the self term subtracted, features appended."""

    def __init__(self, a, b, c):
        super().__init__()
        self.T = nn.Parameter(torch.randn(a, b, c))

    def forward(self, x):
        m = (x @ self.T.flatten(1)).view(-1, *self.T.shape[1:])
        return torch.cat([x, textbook(m, self_term=False)], 1)


def test_torchgan_convention_and_state_dict():
    theirs = TorchganLayer(6, 5, 4).double()
    ours = MinibatchDiscrimination(6, 5, 4).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 6, dtype=torch.float64) * 0.1
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert list(ours.state_dict()) == ["T"]


def test_default_initialisation_is_standard_normal():
    torch.manual_seed(0)
    assert abs(MinibatchDiscrimination(50, 20, 10).T.std().item() - 1) < 0.02
    assert abs(MinibatchDiscrimination.improved_gan(50, 20).T.std().item() - 0.05) < 0.002


def test_improved_gan_convention():
    """Weight-normalised projection, self-distance masked by 1e6, bias, data-dependent start; written out here."""
    torch.manual_seed(0)
    layer = MinibatchDiscrimination.improved_gan(6, 4).double()
    x = torch.randn(10, 6, dtype=torch.float64)

    def distances(scale):
        w = layer.T * (scale.exp() / layer.T.square().sum(0).sqrt())
        m = torch.tensordot(x, w, dims=([1], [0]))
        return (m[:, None] - m[None]).abs().sum(-1) + 1e6 * torch.eye(10, dtype=x.dtype)[:, :, None]

    assert torch.equal(layer.bias, torch.full((4,), -1.0, dtype=x.dtype))
    before = torch.exp(-distances(layer.log_weight_scale)).sum(1) - 1
    torch.testing.assert_close(layer(x), torch.cat([x, before], 1), rtol=1e-10, atol=1e-12)
    half = 0.5 * distances(layer.log_weight_scale).amin(1).mean(0)
    expected_scale = layer.log_weight_scale - half.log()[:, None]
    layer.init_from_data(x)
    torch.testing.assert_close(layer.log_weight_scale, expected_scale)
    nearest = distances(layer.log_weight_scale).amin(1).mean(0)
    torch.testing.assert_close(nearest, torch.full_like(nearest, 2.0))
    torch.testing.assert_close(layer(x)[:, 6:].mean(0), torch.zeros(4, dtype=x.dtype), rtol=0, atol=1e-12)
    assert set(layer.state_dict()) == {"T", "log_weight_scale", "bias"}


@pytest.mark.parametrize("x", [torch.ones(4, 6), torch.ones(1, 6), torch.full((4, 6), float("nan"))])
def test_init_from_bad_data_changes_nothing(x):
    layer = MinibatchDiscrimination.improved_gan(6, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="init_from_data"):
        layer.init_from_data(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_init_from_data_needs_its_parameters():
    with pytest.raises(RuntimeError, match=r"weight_norm=True and bias=True"):
        MinibatchDiscrimination(6, 4).init_from_data(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("name", "arguments"), [("in_features", (0, 4)), ("out_features", (6, -1)), ("kernel_dims", (6, 4, 2.5))]
)
def test_layer_sizes_are_checked(name, arguments):
    with pytest.raises(ValueError, match=f"{name} is .*positive integer"):
        MinibatchDiscrimination(*arguments)


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 1), (6,)])
def test_layer_input_is_checked(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 6\); flatten"):
        MinibatchDiscrimination(6, 4)(torch.zeros(shape))


@pytest.mark.parametrize(("weight_norm", "bias", "concat", "self_term"), list(itertools.product([False, True], repeat=4)))
def test_options_compose(weight_norm, bias, concat, self_term):
    layer = MinibatchDiscrimination(
        6, 4, 3, weight_norm=weight_norm, bias=bias, concat=concat, self_term=self_term, dtype=torch.float64
    )
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (5, 10 if concat else 4)
    expected = textbook(layer.project(x), self_term)
    expected = expected + layer.bias if bias else expected
    torch.testing.assert_close(out[:, -4:], expected, rtol=1e-10, atol=1e-12)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_copies_and_pickles():
    layer, x = MinibatchDiscrimination.improved_gan(6, 4), torch.randn(5, 6)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.cpu
def test_meta_device_then_materialised():
    layer = MinibatchDiscrimination.improved_gan(6, 4, device="meta")
    assert layer(torch.zeros(5, 6, device="meta")).shape == (5, 10)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(5, 6)).isfinite().all()


@pytest.mark.cpu
def test_compiled_discriminator_with_the_layer():
    torch._dynamo.reset()
    critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), MinibatchDiscrimination(8, 4, 3), nn.Linear(12, 1))
    x = torch.randn(5, 6)
    expected = critic(x)
    torch.testing.assert_close(torch.compile(critic, fullgraph=True, backend="aot_eager")(x), expected)


def test_exported_names():
    assert fastgan.functional.minibatch_discrimination is fastgan.minibatch_discrimination
    assert fastgan.nn.MinibatchDiscrimination is MinibatchDiscrimination
