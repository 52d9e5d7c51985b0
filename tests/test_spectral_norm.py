"""Spectral norm as users meet it: equal to torch's two, module by module and step by step."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

import fastgan
from fastgan.nn.utils import remove_spectral_norm
from fastgan.nn.utils import spectral_norm as hook
from fastgan.nn.utils.spectral_norm import SpectralNorm

PAIRS = {"parametrization": (fastgan.spectral_norm, torch_parametrization), "hook": (hook, torch_hook)}
MODULES = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 5, 3), (2, 3, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 5, 4), (2, 3, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 4), None),
    "vector": (lambda: nn.LayerNorm(6), (5, 6)),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def both(pair, make, dtype=torch.float32, **options):
    """The same module with fastgan's and with torch's normalisation, after the same random draws."""
    made = []
    for normalise in pair:
        torch.manual_seed(0)
        made.append(normalise(make().to(dtype), **options))
    return made


def example(shape, dtype=torch.float32):
    return torch.tensor([1, 2, 0]) if shape is None else torch.randn(*shape, dtype=dtype)


def synchronise(ours, theirs):
    ours.load_state_dict(theirs.state_dict())


def assert_same_state(ours, theirs, **tolerance):
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key in mine:
        torch.testing.assert_close(mine[key], other[key], **tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_equals_torch_on_every_kind_of_module(backend, pair, name):
    make, shape = MODULES[name]
    ours, theirs = both(pair, make, torch.float64)
    assert_same_state(ours, theirs)
    for mode in (True, True, False):
        x = example(shape, torch.float64)
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        torch.testing.assert_close(a, b)
        cotangent = torch.randn_like(a)
        grads = [torch.autograd.grad(out, list(m.parameters()), cotangent) for out, m in ((a, ours), (b, theirs))]
        for p, q in zip(*grads, strict=True):
            torch.testing.assert_close(p, q)
        assert_same_state(ours, theirs)
    if name == "vector" and pair[0] is fastgan.spectral_norm:
        fastgan.functional.minibatch_discrimination(torch.zeros(2, 1, 1))  # a vector needs no operator: satisfy the fixture


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.fixture
def one_thread():
    """Many steps on small layers: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(16, 20, 3), lambda: nn.ConvTranspose2d(8, 12, 4)])
def test_a_thousand_steps_resynchronised(one_thread, pair, make):
    """Each from torch's state; errors against the same step in float64, at most twice torch's or a rounding or two."""
    ours, theirs = both(pair, make)
    truth = copy.deepcopy(theirs).double()
    parameter = next(p for n, p in theirs.named_parameters() if not n.startswith("bias"))
    worst = {}
    for step in range(1000):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape), alpha=0.01)
        synchronise(ours, theirs)
        truth.load_state_dict(theirs.state_dict())
        results = []
        for module in (ours, theirs, truth):
            for each in module._forward_pre_hooks.values():
                each(module, None)
            weight = module.weight
            state = [value for key, value in module.state_dict().items() if key.endswith(("_u", "_v"))]
            results.append([weight.detach(), *state])
            if step % 100 == 0:
                leaf = next(p for n, p in module.named_parameters() if not n.startswith("bias"))
                results[-1] += torch.autograd.grad(weight.sin().sum(), leaf)
        for i, (mine, other, true) in enumerate(zip(*results, strict=True)):
            errors = worst.setdefault(i, [0.0, 0.0])
            errors[0], errors[1] = max(errors[0], relative(mine, true)), max(errors[1], relative(other, true))
    for mine, other in worst.values():
        assert mine <= 2 * max(other, torch.finfo(torch.float32).eps)


def test_free_running_in_float64(one_thread, backend, pair):
    make = lambda: nn.Sequential(nn.Linear(9, 20), nn.LeakyReLU(0.2), nn.Linear(20, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))  # noqa: E731
    models = []
    for normalise in pair:
        torch.manual_seed(0)
        model = make().double()
        for layer in model[::2]:
            normalise(layer)
        models.append(model)
    optimisers = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.9)) for m in models]
    for _ in range(200):
        real, fake = torch.randn(16, 9, dtype=torch.float64) + 0.3, torch.randn(16, 9, dtype=torch.float64)
        for model, optimiser in zip(models, optimisers, strict=True):
            loss = (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()  # two forwards, then a backward
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert_same_state(*models, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_iterations_and_dim(pair, iterations, dim):
    if pair[1] is torch_hook and dim < 0:
        pytest.skip("torch's hook takes no negative dim")
    ours, theirs = both(pair, lambda: nn.Conv2d(3, 5, 3), torch.float64, n_power_iterations=iterations, dim=dim, eps=1e-6)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same_state(ours, theirs)


def test_no_iterations(pair):
    layer = pair[0](nn.Linear(4, 3), n_power_iterations=0)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(2, 4))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_cached(pair):
    ours, theirs = both((fastgan.spectral_norm, torch_parametrization), lambda: nn.Linear(4, 3))
    with parametrize.cached():
        assert ours.weight is ours.weight
        theirs.weight  # noqa: B018
        theirs.weight  # noqa: B018
    assert_same_state(ours, theirs)


def test_eval_leaves_u_and_v(pair):
    layer = pair[0](nn.Linear(4, 3)).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(2, 4))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_deepcopy_after_a_forward(pair):
    model = nn.Sequential(pair[0](nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    average = copy.deepcopy(model)
    model.eval()
    torch.testing.assert_close(average.eval()(x), model(x))
    with torch.no_grad():
        next(average.parameters()).add_(1.0)
    assert not torch.equal(average(x), model(x)), "the copy shares the weight"
    assert copy.deepcopy(average)(x).shape == (2, 3)


def test_pickle_of_the_hook():
    layer = hook(nn.Linear(4, 3))
    layer(torch.randn(2, 4))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded.eval()(x), layer.eval()(x))


def test_remove():
    ours, theirs = (normalise(nn.Linear(4, 3)) for normalise in PAIRS["hook"])
    synchronise(ours, theirs)
    x = torch.randn(2, 4)
    ours(x), theirs(x)
    remove_spectral_norm(ours)
    torch.nn.utils.remove_spectral_norm(theirs)
    assert_same_state(ours, theirs)
    assert not ours._forward_pre_hooks and not ours._state_dict_hooks and not ours._load_state_dict_pre_hooks
    with pytest.raises(ValueError, match="not found"):
        remove_spectral_norm(ours)
    ours, theirs = both(PAIRS["parametrization"], lambda: nn.Linear(4, 3))
    for layer in (ours, theirs):
        parametrize.remove_parametrizations(layer, "weight")
    assert_same_state(ours, theirs)


def test_hook_state_dict_versions():
    ours, theirs = both(PAIRS["hook"], lambda: nn.Linear(4, 3), torch.float64)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(30):
        theirs(x)
    state = theirs.state_dict()  # as of version 0: no v, but the normalised weight
    state["weight"] = theirs.weight.detach()
    del state["weight_v"]
    state._metadata[""].pop("spectral_norm")
    ours.load_state_dict(state)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_apply_by_hand_and_twice():
    layer = nn.Linear(4, 3)
    fn = SpectralNorm.apply(layer, "weight", 1, 0, 1e-12)
    assert isinstance(fn, SpectralNorm) and fn.name == "weight"
    with pytest.raises(RuntimeError, match="two spectral_norm hooks on the same parameter weight"):
        hook(layer)


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_bad_weights_leave_u_and_v(backend, pair, fill):
    layer = pair[0](nn.Linear(4, 3))
    weight = next(p for n, p in layer.named_parameters() if n != "bias")
    good = weight.detach().clone()
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.endswith(("_u", "_v"))}
    with torch.no_grad():
        weight.fill_(fill)
    out = layer(torch.ones(2, 4))
    if fill == 0:  # torch: NaN
        out.sum().backward()
        torch.testing.assert_close(out, layer.bias.expand_as(out))
        assert weight.grad.isfinite().all() and (weight.grad != 0).any()
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
    with torch.no_grad():
        weight.copy_(good)
    assert layer(torch.ones(2, 4)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, pair, dtype):
    layer = pair[0](nn.Linear(40, 30)).to(dtype)
    single = copy.deepcopy(layer).float()
    assert all(value.dtype == dtype for value in layer.state_dict().values())  # as torch's: u and v follow the module
    x = torch.randn(2, 40, dtype=dtype)
    layer(x).float().sum().backward()
    single(x.float()).sum().backward()
    torch.testing.assert_close(layer.weight.float(), single.weight, rtol=torch.finfo(dtype).eps, atol=1e-3)
    for p, q in zip(layer.parameters(), single.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 4 * torch.finfo(dtype).eps


def test_meta_device(pair):
    with torch.device("meta"):
        layer = pair[0](nn.Conv2d(3, 5, 3))
        assert layer(torch.empty(1, 3, 8, 8)).shape == (1, 5, 6, 6)


def test_channels_last_is_kept(backend):
    layer = fastgan.spectral_norm(nn.Conv2d(8, 5, 3).to(memory_format=torch.channels_last))
    plain = torch_parametrization(nn.Conv2d(8, 5, 3))
    synchronise(layer, plain)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    plain.weight  # noqa: B018
    torch.testing.assert_close(layer.eval().weight, plain.eval().weight)


def test_target_and_at_most(backend):
    for scale, at_most, expected in ((5.0, False, 2.0), (0.1, False, 2.0), (5.0, True, 2.0), (0.1, True, 0.1)):
        layer = nn.Linear(6, 5, bias=False)
        with torch.no_grad():
            layer.weight.mul_(scale / torch.linalg.matrix_norm(layer.weight, 2))
        fastgan.spectral_norm(layer, n_power_iterations=60, target=2.0, at_most=at_most)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compile_without_graph_breaks(backend, pair, compiler):
    torch._dynamo.reset()
    models = []
    for normalise in (pair[0], pair[1]):
        torch.manual_seed(0)
        models.append(nn.Sequential(normalise(nn.Conv2d(3, 4, 3)), nn.ReLU(), normalise(nn.Conv2d(4, 2, 3))).double())
    synchronise(*models)  # the first iterations were in float32
    compiled = torch.compile(models[0], fullgraph=True, backend=compiler)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        outs = [model(x) for model in (compiled, models[1])]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out.sin().sum(), list(m.parameters())) for out, m in zip(outs, models, strict=True)]
        for p, q in zip(*grads, strict=True):
            torch.testing.assert_close(p, q)
    assert_same_state(*models)


def test_gradient_penalty_through_a_normalised_critic(backend, pair):
    losses = []
    models = []
    for normalise in pair:
        torch.manual_seed(0)
        model = nn.Sequential(
            normalise(nn.Conv2d(3, 8, 3)), nn.SiLU(), normalise(nn.Conv2d(8, 8, 3)), nn.Flatten(), normalise(nn.Linear(128, 1))
        ).double()
        torch.manual_seed(1)
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = (g.flatten(1).norm(dim=1) - 1).square().mean() + model(x.detach()).mean()
        loss.backward()
        losses.append(loss)
        models.append(model)
    torch.testing.assert_close(*losses)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_second_derivative_with_respect_to_the_weight(backend, pair):
    seconds = []
    for layer in both(pair, lambda: nn.Linear(4, 3), torch.float64):
        weight = next(p for n, p in layer.named_parameters() if n != "bias")
        torch.manual_seed(1)
        (g,) = torch.autograd.grad(layer(torch.randn(5, 4, dtype=torch.float64)).square().sum(), weight, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), weight)[0])
    torch.testing.assert_close(*seconds)


def test_errors_say_what_and_leave_u_and_v(pair):
    normalise = pair[0]
    with pytest.raises(ValueError, match="n_power_iterations is -1, expected a whole number"):
        normalise(nn.Linear(4, 3), n_power_iterations=-1)
    with pytest.raises(ValueError, match="eps is nan"):
        normalise(nn.Linear(4, 3), eps=float("nan"))
    with pytest.raises(ValueError, match=r"'bias' of Linear is None|no parameter or buffer with name 'bias'"):
        normalise(nn.Linear(4, 3, bias=False), name="bias")
    with pytest.raises(ValueError, match="'nothing'"):
        normalise(nn.Linear(4, 3), name="nothing")
    with pytest.raises(ValueError, match="uninitialized; run one forward"):
        normalise(nn.LazyLinear(3))
    with pytest.raises(IndexError, match="dim is 2, out of range for a weight of shape"):
        normalise(nn.Linear(4, 3), dim=2)
    with pytest.raises(TypeError, match="complex64, expected one of float16"):
        normalise(nn.Linear(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="target is 0"):
        fastgan.spectral_norm(nn.Linear(4, 3), target=0)
    layer = normalise(nn.Linear(4, 3))
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.endswith(("_u", "_v"))}
    next(p for n, p in layer.named_parameters() if n != "bias").data = torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"u \(3,\) and v \(4,\) don't fit a weight \(5, 4\)"):
        layer(torch.randn(2, 4))
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)


def critic(normalise):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 1)]
    first, second, third, last = [normalise(layer) for layer in layers]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), third, *pool, last).double()


def mixed(layer):
    return (hook if isinstance(layer, nn.Linear) else fastgan.spectral_norm)(layer)


@pytest.mark.parametrize("normalise", [fastgan.spectral_norm, hook, mixed], ids=["parametrization", "hook", "mixed"])
def test_group_per_forward_equals_no_group(backend, normalise):
    alone, grouped = critic(normalise), critic(normalise)
    grouped.load_state_dict(alone.state_dict())
    assert len(fastgan.SpectralNormGroup(grouped)) == 4
    real, fake = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    for model in (alone, grouped):
        (model(real) - model(fake)).mean().backward()  # two forwards before a backward
    assert_same_state(alone, grouped)
    for p, q in zip(alone.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(alone.eval()(real), grouped.eval()(real))
    assert_same_state(alone, grouped)
    average = copy.deepcopy(grouped.train())
    torch.testing.assert_close(average(real), grouped(real))
    assert_same_state(average, grouped)


def test_group_per_step(backend):
    model = critic(fastgan.spectral_norm)
    group = fastgan.SpectralNormGroup(model, refresh="per_step")
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def vectors():
        return [value.clone() for key, value in model.state_dict().items() if key.endswith(("_u", "_v"))]

    def moved(before):
        return any(not torch.equal(a, b) for a, b in zip(before, vectors(), strict=True))

    before = vectors()
    first = model(x)
    assert moved(before)
    before = vectors()
    second = model(x)
    assert not moved(before)
    torch.testing.assert_close(first, second)
    (first - 2 * second).mean().backward()
    optimiser.step()
    with group.freeze():
        model(x)
        model[0].weight  # noqa: B018
    assert not moved(before)
    model(x)
    assert moved(before)
    before = vectors()
    group.refresh()
    model(x)
    assert moved(before)


def test_group_leaves_unread_layers_and_undoes_itself(backend):
    model = nn.ModuleDict({"used": fastgan.spectral_norm(nn.Linear(4, 3)), "unused": fastgan.spectral_norm(nn.Linear(4, 3))})
    model.forward = lambda x: model["used"](x)
    before = copy.deepcopy(model["unused"].state_dict())
    group = fastgan.SpectralNormGroup(model)
    model(torch.randn(2, 4)).sum().backward()
    for key, value in model["unused"].state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in model["unused"].parameters())
    group.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks
    model(torch.randn(2, 4))


def test_group_compiles(backend):
    torch._dynamo.reset()
    model = critic(fastgan.spectral_norm)
    fastgan.SpectralNormGroup(model)
    eager = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), eager(x))
    assert_same_state(model, eager)


class Repeated(nn.Module):
    """Reads one weight three times in a forward, a shared one, and may fail after the second."""

    def __init__(self, normalise):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (normalise(nn.Linear(5, 5)).double() for _ in range(2))
        self.fails = False

    def forward(self, x):
        x = self.first(self.second(self.first(x)))
        if self.fails:
            raise ArithmeticError("half way")
        return self.first(x)


def test_group_with_weights_read_repeatedly(backend, pair):
    alone, grouped = Repeated(pair[0]), Repeated(pair[0])
    fastgan.SpectralNormGroup(grouped)
    x = torch.randn(3, 5, dtype=torch.float64)
    for fails in (False, True, False):
        results = []
        for model in (alone, grouped):
            model.fails = fails
            try:
                results.append(torch.autograd.grad(model(x).sin().sum(), list(model.parameters())))
            except ArithmeticError:
                results.append([])
        torch.testing.assert_close(*results)
        assert_same_state(alone, grouped)


def test_a_weight_is_in_one_group():
    model = critic(fastgan.spectral_norm)
    group = fastgan.SpectralNormGroup(model[:3])
    with pytest.raises(ValueError, match="in a group already"):
        fastgan.SpectralNormGroup(model)
    group.remove()
    assert len(fastgan.SpectralNormGroup(model)) == 4


def test_group_after_the_model_has_changed_dtype(backend):
    model = critic(mixed)
    fastgan.SpectralNormGroup(model)
    x = torch.randn(2, 3, 8, 8)
    model(x.double())
    before = [value.clone() for value in model.buffers()]
    assert model.float()(x).dtype == torch.float32
    assert any(not torch.equal(a.float(), b) for a, b in zip(before, model.buffers(), strict=True))


def test_group_errors():
    with pytest.raises(ValueError, match="refresh is 'always', expected one of 'per_forward', 'per_step'"):
        fastgan.SpectralNormGroup(critic(fastgan.spectral_norm), refresh="always")
    with pytest.raises(ValueError, match="no weight that fastgan normalises"):
        fastgan.SpectralNormGroup(nn.Linear(4, 3))


# What the zoos' layers compute in eval mode, from their state_dicts: v, then u, from u.
def zoo_output(weight, u):
    matrix, u = weight.flatten(1), u.flatten()
    v = nn.functional.normalize(matrix.T @ u, dim=0)
    u = nn.functional.normalize(matrix @ v, dim=0)
    return weight / (u @ matrix @ v)


ZOO_KEYS = {
    "biggan": ("0.weight", "0.u0", "0.bias"),
    "mimicry": ("0.weight", "0.sn_u", "0.bias"),
    "torchgan": ("0.w_bar", "0.u", "0.module.bias"),
    "cosgrove": ("0.module.weight_bar", "0.module.weight_u", "0.module.bias"),
}


def plain_and(normalise, steps):
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Conv2d(6, 9, 3).double()), nn.BatchNorm2d(9).double())
    for _ in range(steps):
        model(torch.randn(2, 6, 8, 8, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("zoo", ZOO_KEYS)
@pytest.mark.parametrize("form", [fastgan.spectral_norm, hook], ids=["parametrize", "hook"])
def test_convert_to_a_zoo_and_back(form, zoo):
    model = plain_and(form, 2 if form is hook else 300)  # exactly; once converged
    model(torch.randn(2, 6, 8, 8, dtype=torch.float64))
    expected = model[0].weight
    state = model.state_dict()
    there = fastgan.convert_spectral_state_dict(state, to=zoo)
    weight, u, bias = ZOO_KEYS[zoo]
    assert {weight, u, bias, "1.weight", "1.running_mean"} <= set(there) and not any(
        "_orig" in k or "param" in k for k in there
    )
    torch.testing.assert_close(zoo_output(there[weight], there[u]), expected)
    back = fastgan.convert_spectral_state_dict(there, to="hook" if form is hook else "parametrize")
    assert set(back) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(back[key], value)


@pytest.mark.parametrize("zoo", ZOO_KEYS)
@pytest.mark.parametrize("form", [fastgan.spectral_norm, hook], ids=["parametrize", "hook"])
def test_load_what_a_zoo_saved(form, zoo):
    """Not converged, and as the zoo's own layers have it."""
    torch.manual_seed(1)
    weight, u = torch.randn(9, 6, 3, 3, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    keys = ZOO_KEYS[zoo]
    model = plain_and(form, 0)
    foreign = {keys[0]: weight, keys[1]: u if zoo in ("biggan", "mimicry") else u[0], keys[2]: torch.zeros(9).double()}
    foreign |= {k: v for k, v in model.state_dict().items() if k.startswith("1.")}
    extra = {"biggan": {"0.sv0": torch.ones(1), "0.u1": u, "0.sv1": torch.ones(1)}, "mimicry": {"0.sn_sigma": torch.ones(1)}}
    v = torch.randn(54, dtype=torch.float64)
    foreign |= extra.get(zoo, {keys[1].removesuffix("u") + "v": v})
    model.load_state_dict(foreign)
    model(torch.randn(2, 6, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight.detach(), zoo_output(weight, u))
    assert model[0].bias.eq(0).all()


SCHEME_KEYS = ZOO_KEYS | {
    "hook": ("0.weight_orig", "0.weight_u", "0.bias"),
    "parametrize": ("0.parametrizations.weight.original", "0.parametrizations.weight.0._u", "0.bias"),
}


@pytest.mark.parametrize("source", SCHEME_KEYS)
@pytest.mark.parametrize("target", SCHEME_KEYS)
def test_convert_any_scheme_to_any(source, target):
    """What a layer computes in eval mode stays, from weights that no iteration has converged on."""
    state = fastgan.convert_spectral_state_dict(plain_and(hook, 2).state_dict(), to=source)
    converted = fastgan.convert_spectral_state_dict(state, to=target)
    outputs = []
    for scheme, each in ((source, state), (target, converted)):
        weight, u, bias = SCHEME_KEYS[scheme]
        assert {weight, u, bias, "1.weight"} <= set(each)
        if scheme in ZOO_KEYS:
            outputs.append(zoo_output(each[weight], each[u]))
        else:
            matrix = each[weight].flatten(1)
            outputs.append(each[weight] / (each[u] @ matrix @ each[u.removesuffix("u") + "v"]))
    torch.testing.assert_close(*outputs)


def test_num_svs():
    """Layers that keep the k largest singular values, as BigGAN's do: logged, saved, loaded, and of no effect on the weight."""
    make = lambda **options: fastgan.spectral_norm(nn.Conv2d(3, 8, 3).double(), **options)  # noqa: E731
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    layer = make(num_svs=3)
    for _ in range(300):
        torch.testing.assert_close(layer.weight, plain.weight)
    state = layer.state_dict()
    own = "parametrizations.weight.0."
    true = torch.linalg.svdvals(state["parametrizations.weight.original"].flatten(1))
    torch.testing.assert_close(torch.cat([state[f"{own}sv{i}"] for i in range(3)]), true[:3])
    assert [state[f"{own}u{i}"].shape for i in (1, 2)] == [(1, 8)] * 2
    layer.eval().weight  # noqa: B018
    assert_same_state(layer, copy.deepcopy(layer))
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())

    theirs = fastgan.convert_spectral_state_dict(state, to="biggan")
    assert set(theirs) == {"weight", "bias", "u0", "u1", "u2", "sv0", "sv1", "sv2"}
    other = make(num_svs=3)
    other.load_state_dict(theirs)
    for key, value in state.items():
        torch.testing.assert_close(other.state_dict()[key], value)
    other.load_state_dict(plain.state_dict())  # has none: those there stay
    assert torch.equal(other.state_dict()[f"{own}u1"], state[f"{own}u1"])
    torch_parametrization(nn.Conv2d(3, 8, 3)).load_state_dict(fastgan.convert_spectral_state_dict(theirs, to="parametrize"))


def test_num_svs_in_groups_compiled_in_half_and_with_bad_weights(backend):
    def model():
        torch.manual_seed(0)
        layers = [fastgan.spectral_norm(nn.Linear(6, 6), num_svs=n) for n in (2, 1, 4)]
        return nn.Sequential(*layers).double()

    alone, grouped, compiled = model(), model(), model()
    fastgan.SpectralNormGroup(grouped)
    torch._dynamo.reset()
    x = torch.randn(2, 6, dtype=torch.float64)
    outs = [run(x) for run in (alone, grouped, torch.compile(compiled, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(outs, [outs[0]] * 3)
    for other in (grouped, compiled):
        assert_same_state(alone, other)
    half = alone.half()
    half(x.half())
    before = {key: value.clone() for key, value in half.state_dict().items() if ".u" in key}
    for fill in (0, float("nan")):
        with torch.no_grad():
            for parameter in half.parameters():
                parameter.fill_(fill)
        half(x.half())
        assert all(torch.equal(value, half.state_dict()[key]) for key, value in before.items())
    for wrong in (0, 7, True, 1.5):
        with pytest.raises(ValueError, match=r"num_svs is .*, expected a whole number from 1 to 4 for a matrix of 4 x 7"):
            fastgan.spectral_norm(nn.Linear(7, 4), num_svs=wrong)


def test_hook_and_parametrization_load_each_other(pair):
    torch.manual_seed(0)
    make = lambda form: nn.Sequential(form(nn.ConvTranspose2d(5, 5, 3)), nn.ReLU(), form(nn.Conv2d(5, 2, 3)))  # noqa: E731
    x = torch.randn(2, 5, 6, 6)
    other = torch_hook if pair[0] is fastgan.spectral_norm else torch_parametrization
    theirs, ours = make(other), make(pair[0])
    theirs(x)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    to = "parametrize" if pair[0] is hook else "hook"
    theirs.load_state_dict(fastgan.convert_spectral_state_dict(ours.state_dict(), to=to))
    torch.testing.assert_close(ours(x), theirs(x))


def test_conversion_errors():
    state = fastgan.spectral_norm(nn.ConvTranspose2d(3, 5, 3)).state_dict()
    with pytest.raises(ValueError, match="to is 'keras', expected one of 'hook'"):
        fastgan.convert_spectral_state_dict(state, to="keras")
    with pytest.raises(ValueError, match="dimension 1 as rows, the scheme 'biggan' knows only 0"):
        fastgan.convert_spectral_state_dict(state, to="biggan")
    state["parametrizations.weight.0._u"] = torch.randn(7)
    with pytest.raises(ValueError, match="has 7 elements"):
        fastgan.convert_spectral_state_dict(state, to="hook")


def test_functional(backend):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (3, 6, 2))]
    u, v = ([torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes] for sizes in ((5, 6), (4, 6)))
    together = fastgan.functional.spectral_normalize(weights, u, v, dim=[0, 1], n_power_iterations=200)
    for i, weight in enumerate(weights):
        normalised, new_u, _, sigma = fastgan.functional.spectral_normalize(weight, u[i], v[i], dim=i, n_power_iterations=200)
        norm = torch.linalg.matrix_norm(weight.movedim(i, 0).flatten(1), 2)
        torch.testing.assert_close(sigma, norm)
        torch.testing.assert_close(normalised, weight / norm)
        torch.testing.assert_close((together[0][i], together[1][i], together[3][i]), (normalised, new_u, sigma))
    with pytest.raises(ValueError, match=r"v has shape \(4,\), expected \(12,\)"):
        fastgan.functional.spectral_normalize(torch.randn(5, 12), u[0].float(), v[0].float())
    with pytest.raises(TypeError, match=r"u has dtype .*float64, expected .*float32"):
        fastgan.functional.spectral_normalize(weights[0].half(), u[0], v[0])
    with pytest.raises(ValueError, match="have 2, 1, 2 and 2 elements"):
        fastgan.functional.spectral_normalize(weights, u[:1], v)
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        fastgan.functional.spectral_normalize(torch.ones(3, 4).long(), u[0], v[0])


def test_largest_singular_value(backend):
    generator = torch.Generator().manual_seed(0)
    for dim, v_first in ((0, False), (1, True), (-1, False)):
        weight = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        rows = weight.shape[dim]
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (rows, 90 // rows))
        options = {"dim": dim, "v_first": v_first}
        once = fastgan.functional.largest_singular_value(weight, u, v, **options)
        torch.testing.assert_close(once, fastgan.functional.spectral_normalize(weight, u, v, **options)[1:])
        u, v, sigma = fastgan.functional.largest_singular_value(weight, u, v, n_power_iterations=300, **options)
        matrix = weight.movedim(dim, 0).flatten(1)
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2))
        ours, true = (torch.autograd.grad(x, weight)[0] for x in (sigma, torch.linalg.matrix_norm(matrix, 2)))
        torch.testing.assert_close(ours, true)
    with pytest.raises(ValueError, match=r"largest_singular_value: u has shape \(5,\), expected \(6,\)"):
        fastgan.functional.largest_singular_value(weight, v[:5], v)
    with pytest.raises(TypeError, match=r"largest_singular_value: u has dtype torch.float64, expected torch.float32"):
        fastgan.functional.largest_singular_value(weight.float(), weight[:, 0, 0], v[:15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, dim", [((13, 1100), 0), ((9, 4103), 0), ((8, 600), 0), ((3, 17, 650), 1), ((2, 5, 1025), 1)])
def test_columns_first_at_the_edges_of_tiles(backend, shape, dim, dtype):
    """Wide tiles, their last columns, and rows beyond the last eight: v = W^T u, then u = W v."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    matrix = weight.movedim(dim, 0).flatten(1)
    u = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
    v = matrix.T @ u / (matrix.T @ u).norm()
    want = matrix @ v / (matrix @ v).norm(), v, (matrix @ v).norm()
    found = fastgan.functional.largest_singular_value(
        weight.to(dtype), u.to(dtype), torch.full_like(v, torch.nan, dtype=dtype), dim=dim, v_first=True
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-12 if dtype == torch.float64 else 2e-5, atol=1e-7)


def biggan_iteration(matrix, u):
    """The definition, one vector and one projection at a time."""
    us, vs, sigmas = [], [], []
    for x in u:
        for found, product in ((vs, lambda x: matrix.T @ x), (us, lambda x: matrix @ x)):
            x = product(x)
            for y in found:
                x = x - (x @ y) / (y @ y) * y
            x = x / x.norm()
            found.append(x)
        sigmas.append(us[-1] @ matrix @ vs[-1])
    return torch.stack(us), torch.stack(vs), torch.stack(sigmas)


@pytest.mark.parametrize("shape, dim, k", [((9, 6, 3, 3), 0, 4), ((5, 8, 2), 1, 1), ((7, 3), 0, 3), ((3, 7), -1, 3)])
def test_top_singular_values(shape, dim, k):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    matrix = weight.detach().movedim(dim, 0).flatten(1)
    start = torch.randn(k, matrix.shape[0], dtype=torch.float64)
    expected, u = start, start
    for _ in range(3):
        expected, v, sigma = biggan_iteration(matrix, expected)
        u, *rest = fastgan.functional.top_singular_values(weight, u, dim=dim)
        torch.testing.assert_close((u, *rest), (expected, v, sigma))
    (grad,) = torch.autograd.grad(rest[1][0], weight)
    torch.testing.assert_close(grad.movedim(dim, 0).flatten(1), torch.outer(u[0], v[0]))
    _, _, sigma = fastgan.functional.top_singular_values(weight, start, dim=dim, n_power_iterations=2000)
    torch.testing.assert_close(sigma.detach(), torch.linalg.svdvals(matrix)[:k])


def test_the_first_of_the_top_singular_values_is_spectral_normalize():
    weight, u = torch.randn(6, 5).half(), torch.randn(3, 6)
    unit = u[0] / u[0].norm()
    _, first_u, first_v, sigma = fastgan.functional.spectral_normalize(weight, unit, torch.zeros(5), v_first=True)
    top_u, top_v, top = fastgan.functional.top_singular_values(weight, u)
    torch.testing.assert_close((top_u[0], top_v[0], top[0]), (first_u, first_v, sigma))


def test_top_singular_values_errors():
    weight, u = torch.randn(4, 3), torch.randn(2, 4)
    for change, error, match in (
        ({"weight": weight.long()}, TypeError, r"weight is torch\.int64"),
        ({"weight": weight[0]}, ValueError, r"dim is 0 for a weight of shape \(3,\)"),
        ({"dim": 2}, ValueError, "dim is 2"),
        ({"u": torch.randn(4, 4)}, ValueError, r"expected \(k, 4\) with k from 1 to 3"),
        ({"u": u.double()}, TypeError, "u has dtype torch.float64, expected torch.float32"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations is 0, expected 1 or more"),
    ):
        with pytest.raises(error, match=match):
            fastgan.functional.top_singular_values(**{"weight": weight, "u": u} | change)


# Large results go into memory that earlier ones let go of (csrc/cpu/blocks.h).
LARGE = (256, 512)  # above glibc's threshold


def large(form):
    torch.manual_seed(0)
    return form(nn.Linear(*LARGE[::-1], bias=False))


@pytest.mark.cpu
def test_nothing_alive_changes_when_memory_is_used_again(pair):
    """Everything that may hold a result: a graph, retained ones, a view, an array, a copy for averaging, .grad."""
    layers = [large(form) for form in pair]
    x = torch.randn(4, LARGE[1])
    kept = []
    for step in range(4):
        outs, first = [], []
        for layer in layers:
            one = layer(x)
            if layer is layers[0]:
                weight = layer.weight if pair[0] is hook else layer(torch.eye(LARGE[1])).T
                for held in (weight.detach()[3:], weight.detach().numpy(), copy.deepcopy(layer).weight.detach()):
                    kept.append((held, held.copy() if hasattr(held, "flags") else held.clone()))
            elif pair[0] is not hook:
                layer.weight  # noqa: B018
            two = layer(x + 1)
            loss = (one * two).sin().sum()
            leaf = next(layer.parameters())
            first.append(torch.autograd.grad(loss, leaf, retain_graph=True, create_graph=step % 2 == 0)[0])
            with torch.no_grad():
                layer(x)  # results that come and go between forward and backward
                layer.eval()(x)
                layer.train()
            loss.backward()
            outs += [one, two, leaf.grad.clone()]
        torch.testing.assert_close(outs[:3], outs[3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4)
    for held, copied in kept:
        assert (held == copied).all()


@pytest.mark.cpu
def test_memory_is_used_again_once_nothing_refers_to_it():
    layer = large(fastgan.spectral_norm)
    with fastgan.use_backend("cpp"), torch.no_grad():
        address = layer.weight.data_ptr()
        assert layer.weight.data_ptr() == address
        held = layer.weight[5:]
        assert layer.weight.data_ptr() != address
        del held
        assert layer.weight.data_ptr() == address


@pytest.mark.cpu
def test_memory_used_again_under_resize_and_set():
    """What torch does to storages: it works, or raises without touching what other tensors have."""
    layer = large(fastgan.spectral_norm).eval()
    with fastgan.use_backend("cpp"), torch.no_grad():
        expected = layer.weight.clone()
        kept = layer.weight
        assert torch.equal(layer.weight.resize_(3, 5).flatten(), expected.flatten()[:15])
        torch.testing.assert_close(layer.weight.set_(torch.ones(4)), torch.ones(4))
        torch.testing.assert_close(torch.empty(0).set_(layer.weight), expected)
        moved = layer.weight.share_memory_()
        assert moved.is_shared() and torch.equal(moved, expected)
        assert torch.equal(torch.add(torch.ones(2, 3), 1, out=layer.weight.resize_(0)), torch.full((2, 3), 2.0))
        for enlarge in (
            lambda x: x.resize_(1000, 1000),
            lambda x: x.untyped_storage().resize_(10**7),
            lambda x: torch.add(torch.zeros(1000, 1000), 1, out=x.resize_(0)),
        ):
            with pytest.raises(RuntimeError, match="not resizable"):
                enlarge(layer.weight)
            again = [layer.weight for _ in range(3)]
            assert all(torch.equal(x, expected) for x in again)
            assert len({x.data_ptr() for x in (*again, kept)}) == 4
        assert torch.equal(kept, expected)


# The layers' own way through autograd, and where it leaves it to the operators'.


def test_double_backward_and_forward_mode_over_backward(pair):
    torch.manual_seed(0)
    layer = pair[0](nn.Linear(4, 3).double())
    x, t = torch.randn(2, 5, 4, dtype=torch.float64)
    for _ in range(20):
        layer(x)
    leaf = next(p for n, p in layer.eval().named_parameters() if n != "bias")

    def gradient(create_graph=False):
        return torch.autograd.grad(layer(x).sin().sum(), leaf, create_graph=create_graph)[0]

    def gradient_at(shift):
        with torch.no_grad():
            leaf.add_(direction, alpha=shift)
            with torch.enable_grad():
                value = gradient()
            leaf.sub_(direction, alpha=shift)
        return value

    direction = torch.randn_like(leaf)
    (expected,) = torch.autograd.grad((gradient(True) * direction).sum(), leaf)
    torch.testing.assert_close((gradient_at(1e-5) - gradient_at(-1e-5)) / 2e-5, expected, rtol=1e-6, atol=1e-7)
    # a tangent that only arrives in the backward pass
    out = layer(x)
    (linear,) = torch.autograd.grad(out, leaf, t[:, :3] * 2, retain_graph=True)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(t[:, :3], t[:, :3] * 2))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, linear)


@pytest.mark.parametrize("grouped", [False, True])
def test_backward_after_the_weight_has_changed_raises(pair, grouped):
    model = nn.Sequential(pair[0](nn.Linear(4, 3)))
    if grouped:
        fastgan.SpectralNormGroup(model)
    loss = model(torch.randn(2, 4)).sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if not n.endswith("bias")).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_transforms_of_a_module(pair):
    ours, theirs = both(pair, lambda: nn.Linear(4, 3), torch.float64)
    synchronise(ours, theirs)
    x = torch.randn(5, 4, dtype=torch.float64)
    values = []
    for layer in (ours.eval(), theirs.eval()):
        if pair[0] is hook:
            layer(x)  # the attribute `weight` is set by a forward

        def loss(parameters, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        values.append((torch.func.grad(loss)(parameters), torch.func.jvp(loss, (parameters,), (tangents,))))
    torch.testing.assert_close(*values)


def test_hooks_and_further_parametrizations_still_run():
    layer = fastgan.spectral_norm(nn.Linear(4, 3)).eval()
    plain = layer.weight.detach()
    chain, seen = layer.parametrizations.weight, []
    handles = [
        chain.register_forward_pre_hook(lambda *_: seen.append("before")),
        chain[0].register_forward_hook(lambda module, inputs, output: output * 2),
    ]
    torch.testing.assert_close(layer.weight, plain * 2)
    assert seen == ["before"]
    for handle in handles:
        handle.remove()

    class Triple(nn.Module):
        def forward(self, weight):
            return 3 * weight

    parametrize.register_parametrization(layer, "weight", Triple())
    torch.testing.assert_close(layer.weight, plain * 3)


def test_jit_trace():
    layer = fastgan.spectral_norm(nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
