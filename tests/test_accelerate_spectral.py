"""accelerate on spectral norm as other libraries have it in their layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from fastgan.dropin import served

torch.set_num_threads(1)


# As their libraries have them, the arithmetic written again


def unit(x, eps=1e-12):
    return F.normalize(x, dim=-1, eps=eps)


class BigGAN:
    """BigGAN-PyTorch's SN: u0, u1, ... and sv0, sv1, ...; Gram-Schmidt between several."""

    def start(self, rows, num_svs=1, num_itrs=1, eps=1e-12):
        self.num_svs, self.num_itrs, self.eps, self.transpose = num_svs, num_itrs, eps, False
        for i in range(num_svs):
            self.register_buffer(f"u{i}", torch.randn(1, rows))
            self.register_buffer(f"sv{i}", torch.ones(1))

    u = property(lambda self: [getattr(self, f"u{i}") for i in range(self.num_svs)])
    sv = property(lambda self: [getattr(self, f"sv{i}") for i in range(self.num_svs)])

    def iterate(self, matrix):
        us, vs, sigmas = [], [], []
        without = lambda x, others: x - sum((x @ o.t()) * o / (o @ o.t()) for o in others) if others else x  # noqa: E731
        for u in self.u:
            with torch.no_grad():
                vs.append(unit(without(u @ matrix, vs), self.eps))
                us.append(unit(without(vs[-1] @ matrix.t(), us), self.eps))
                if self.training:
                    u.copy_(us[-1])
            sigmas.append((vs[-1] @ matrix.t() @ us[-1].t()).squeeze())
        return sigmas

    def W_(self):
        for _ in range(self.num_itrs):
            sigmas = self.iterate(self.weight.flatten(1))
        if self.training:
            with torch.no_grad():
                for stored, sigma in zip(self.sv, sigmas, strict=True):
                    stored[:] = sigma
        return self.weight / sigmas[0]


class Mimicry:
    """mimicry's SpectralNorm: sn_u and sn_sigma."""

    def start(self, rows, num_iters=1, eps=1e-12):
        self.num_iters, self.eps = num_iters, eps
        self.register_buffer("sn_u", torch.randn(1, rows))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self):
        matrix, u = self.weight.flatten(1), self.sn_u
        with torch.no_grad():
            for _ in range(self.num_iters):
                v = unit(u @ matrix, self.eps)
                u = unit(v @ matrix.t(), self.eps)
        sigma = u @ (matrix @ v.t())
        if self.training:
            with torch.no_grad():
                self.sn_sigma[:] = sigma
                self.sn_u[:] = u
        return self.weight / sigma


def layer_kinds(scheme, read):
    class SNConv2d(nn.Conv2d, scheme):
        def __init__(self, *args, options=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.start(self.out_channels, **dict(options))

        def forward(self, x):
            return F.conv2d(x, getattr(self, read)(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    class SNLinear(nn.Linear, scheme):
        def __init__(self, *args, options=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.start(self.out_features, **dict(options))

        def forward(self, x):
            return F.linear(x, getattr(self, read)(), self.bias)

    for cls in (SNConv2d, SNLinear):
        cls.__qualname__ = f"{cls.__name__}{scheme.__name__}"
        globals()[cls.__qualname__] = cls  # for pickles
    return SNConv2d, SNLinear


SN = {BigGAN: layer_kinds(BigGAN, "W_"), Mimicry: layer_kinds(Mimicry, "sn_weights")}


class SpectralNorm(nn.Module):
    """christiancosgrove's, copied from project to project: u and v are parameters, and move in evaluation too."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = getattr(module, name).data
        del module._parameters[name]
        for part, size in (("u", weight.shape[0]), ("v", weight[0].numel())):
            module.register_parameter(f"{name}_{part}", nn.Parameter(unit(torch.randn(size)), requires_grad=False))
        module.register_parameter(f"{name}_bar", nn.Parameter(weight))

    def _update_u_v(self):
        u, v, w = (getattr(self.module, f"{self.name}_{part}") for part in ("u", "v", "bar"))
        for _ in range(self.power_iterations):
            v.data = self.normal(w.flatten(1).t().data @ u.data)
            u.data = self.normal(w.flatten(1).data @ v.data)
        setattr(self.module, self.name, w / self.sigma(u, w.flatten(1), v))

    normal = staticmethod(lambda x: x / (x.norm() + 1e-12))

    def sigma(self, u, matrix, v):
        return u @ (matrix @ v)

    def forward(self, *args):
        self._update_u_v()
        return self.module.forward(*args)


class SpectralNorm2d(nn.Module):
    """torchgan's: the same with all of it in the wrapper."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = getattr(module, name).data
        self.u, self.v = (
            nn.Parameter(unit(torch.randn(size)), requires_grad=False) for size in (weight.shape[0], weight[0].numel())
        )
        self.w_bar = nn.Parameter(weight)
        del module._parameters[name]

    def forward(self, *args):
        matrix = self.w_bar.flatten(1)
        for _ in range(self.power_iterations):
            self.v.data = SpectralNorm.normal(matrix.t().data @ self.u.data)
            self.u.data = SpectralNorm.normal(matrix.data @ self.v.data)
        setattr(self.module, self.name, self.w_bar / (self.u @ (matrix @ self.v)))
        return self.module.forward(*args)


def layers_of(scheme, **options):
    """Convolution, activation, linear layer."""
    if scheme in SN:
        conv, linear = SN[scheme]
        first, second = conv(3, 5, 3, padding=1, options=options), linear(5 * 16, 2, options=options)
    else:
        first, second = (scheme(m, **options) for m in (nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * 16, 2)))
    return nn.Sequential(first, nn.LeakyReLU(0.2), nn.Flatten(), second)


CASES = {
    "biggan": lambda: layers_of(BigGAN),
    "biggan, two iterations": lambda: layers_of(BigGAN, num_itrs=2, eps=1e-6),
    "biggan, two values": lambda: layers_of(BigGAN, num_svs=2),
    "mimicry": lambda: layers_of(Mimicry),
    "mimicry, three iterations": lambda: layers_of(Mimicry, num_iters=3),
    "cosgrove": lambda: layers_of(SpectralNorm),
    "cosgrove, two iterations": lambda: layers_of(SpectralNorm, power_iterations=2),
    "torchgan": lambda: layers_of(SpectralNorm2d),
}


def twins(name, dtype=torch.float64):
    torch.manual_seed(0)
    plain = CASES[name]().to(dtype)
    return copy.deepcopy(plain), plain


def stored(model):
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_give_the_same_numbers(name):
    ours, plain = twins(name)
    keys, before = list(plain.state_dict()), stored(ours)
    report = fastgan.accelerate(ours)
    assert [r.name for r in report.replaced if "spectral_normalize" in r.by] == ["0", "3"], report
    assert all(map(torch.equal, before, stored(ours))), "the probe left traces"
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (ours, plain)]
    for step in range(4):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            model.train(step != 1)
            leaf = x.clone().requires_grad_()
            scores = model(leaf)
            (slope,) = torch.autograd.grad(scores.sum(), leaf, create_graph=True)
            optimizer.zero_grad()
            (scores.square().mean() + slope.square().sum()).backward()
            optimizer.step()
        for a, b in zip(stored(ours), stored(plain), strict=True):  # wrappers divide by |x| + 1e-12
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-8, atol=1e-9)
    assert list(ours.state_dict()) == keys
    fastgan.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert not any(map(served.is_served, ours.modules()))


@pytest.mark.parametrize("name", ["biggan", "mimicry"])
def test_copies_pickles_and_compile(name):
    ours, plain = twins(name, torch.float32)
    fastgan.accelerate(ours)
    x = torch.randn(6, 3, 4, 4)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        expected = copy.deepcopy(plain)
        torch.testing.assert_close(model(x), expected(x))
        torch.testing.assert_close(model(x), expected(x))
    expected = [plain(x) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    for value in expected:
        torch.testing.assert_close(compiled(x), value)


@pytest.mark.parametrize("name", ["biggan", "mimicry", "cosgrove", "torchgan"])
def test_verify_leaves_u_and_v_where_they_were(name):
    ours, _ = twins(name)
    before = stored(ours)
    report = fastgan.accelerate(ours, verify=True, example_inputs=torch.randn(6, 3, 4, 4, dtype=torch.float64))
    assert len([r for r in report.replaced if "spectral_normalize" in r.by]) == 2, report
    assert all(map(torch.equal, before, stored(ours)))


@pytest.mark.parametrize("name", ["biggan", "mimicry", "cosgrove", "torchgan"])
def test_zeros_stay_zeros_and_u_stays(name):
    ours, _ = twins(name, torch.float32)
    fastgan.accelerate(ours)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.zero_()
    before = [t for t in stored(ours) if t.numel() > 1]
    assert ours(torch.randn(6, 3, 4, 4)).abs().max() == 0
    assert all(map(torch.equal, before, [t for t in stored(ours) if t.numel() > 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(dtype):
    ours, _ = twins("biggan", dtype)
    exact = copy.deepcopy(ours).double()
    fastgan.accelerate(ours)
    for layer, reference in ((ours[0], exact[0]), (ours[3], exact[3])):
        w, expected = layer.W_(), reference.W_()
        assert w.dtype == dtype
        assert (w - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
        assert (layer.u0 - reference.u0).norm() <= 2 * torch.finfo(dtype).eps


class Detached(SpectralNorm):
    def sigma(self, u, matrix, v):
        return super().sigma(u, matrix, v).detach()


class Exact(SpectralNorm):
    def sigma(self, u, matrix, v):
        return torch.linalg.matrix_norm(matrix, 2)


class Broken(SpectralNorm):
    def _update_u_v(self):
        raise KeyError("not today")


@pytest.mark.parametrize(
    ("wrap", "why"), [(Detached, "something else"), (Exact, "something else"), (Broken, "could not be probed: KeyError")]
)
def test_what_only_looks_like_it_is_left(wrap, why):
    model = layers_of(wrap).double()
    before = stored(model), [sorted(vars(m)) for m in model.modules()]
    report = fastgan.accelerate(nn.ModuleList([model[0]]))
    assert why in report.skipped[0].why and report.skipped[0].name == "0", report
    assert all(map(torch.equal, before[0], stored(model)))
    fastgan.restore(model[0])
    assert before[1][:3] == [sorted(vars(m)) for m in model.modules()][:3]


def test_replaced_on_the_instance_and_meta():
    model = layers_of(Mimicry)
    model[0].sn_weights = lambda: model[0].weight
    model[3].to("meta")
    whys = [s.why for s in fastgan.accelerate(model).skipped]
    assert "on the instance" in whys[0] and "meta" in whys[1]
