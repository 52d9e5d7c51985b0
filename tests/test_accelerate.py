"""accelerate and restore: nothing but the speed changes, everything can be taken back, and what differs is refused."""

import copy
import gc
import io
import pickle
import weakref

import critics
import pytest
import reference
import torch
import torch.nn.functional as F
from flops import flops
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.critic import second_order
from fastgan.dropin import served

torch.set_num_threads(1)


# Layers as their libraries have them, the arithmetic written again


class MinibatchDiscrimination1d(nn.Module):
    """torchgan's."""

    def __init__(self, in_features, out_features, intermediate_features=16):
        super().__init__()
        self.in_features, self.out_features, self.intermediate_features = in_features, out_features, intermediate_features
        self.T = nn.Parameter(torch.randn(in_features, out_features, intermediate_features))

    def forward(self, x):
        m = torch.mm(x, self.T.view(self.in_features, -1)).view(-1, self.out_features, self.intermediate_features)
        return torch.cat([x, torch.exp(-(m[:, None] - m).abs().sum(3)).sum(1) - 1], 1)


class MinibatchLayer(nn.Module):
    """improved-gan's."""

    def __init__(self, num_inputs, num_kernels, dim_per_kernel=5):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(num_inputs, num_kernels, dim_per_kernel) * 0.05)
        self.log_weight_scale = nn.Parameter(torch.randn(num_kernels, dim_per_kernel) * 0.1)
        self.b = nn.Parameter(-torch.ones(num_kernels))

    def forward(self, x):
        w = self.theta * (self.log_weight_scale.exp() / self.theta.square().sum(0).sqrt())
        m = torch.einsum("na,akd->nkd", x, w)
        distance = (m[:, None] - m).abs().sum(3) + 1e6 * torch.eye(len(x), dtype=x.dtype)[..., None]
        return torch.cat([x, torch.exp(-distance).sum(1) + self.b], 1)


class MiniBatchDiscrimination(nn.Module):
    """A common variant: the parameter is a matrix, features are averages, input not passed on."""

    def __init__(self, a, k, d):
        super().__init__()
        self.kernels, self.width = k, d
        self.W = nn.Parameter(torch.randn(a, k * d))

    def forward(self, x):
        m = (x @ self.W).view(-1, self.kernels, self.width)
        return (torch.exp(-(m[:, None] - m).abs().sum(3)).sum(1) - 1) / (len(x) - 1)


class MinibatchStdLayer(nn.Module):
    """StyleGAN2-ADA's and 3's."""

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x):
        n, c, h, w = x.shape
        g = min(self.group_size, n) if self.group_size is not None else n
        y = x.reshape(g, -1, self.num_channels, c // self.num_channels, h, w)
        y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([2, 3, 4])
        return torch.cat([x, y.reshape(-1, self.num_channels, 1, 1).repeat(g, 1, h, w)], 1)


class MiniBatchStddevLayer(nn.Module):
    """mmgeneration's, which asserts that groups divide the batch."""

    def __init__(self, group_size=4, eps=1e-8, gather_all_batch=False):
        super().__init__()
        self.group_size, self.eps, self.gather_all_batch = group_size, eps, gather_all_batch

    def forward(self, x):
        n, c, h, w = x.shape
        g = min(n, self.group_size)
        assert n % g == 0
        y = x.view(g, -1, c, h, w)
        y = ((y - y.mean(0, keepdim=True)).pow(2).mean(0) + self.eps).sqrt().mean((1, 2, 3), keepdim=True)
        return torch.cat([x, y.repeat(g, 1, h, w)], 1)


class ModMBStddevLayer(nn.Module):
    """mmgeneration's with groups of channels."""

    def __init__(self, group_size=4, channel_groups=1, sync_std=False, eps=1e-8):
        super().__init__()
        self.group_size, self.channel_groups, self.sync_std, self.eps = group_size, channel_groups, sync_std, eps

    def forward(self, x):
        n, c, h, w = x.shape
        g = min(n, self.group_size)
        assert n % g == 0
        y = x.view(g, -1, self.channel_groups, c // self.channel_groups, h, w)
        y = (y.var(0, unbiased=False) + self.eps).sqrt().mean((2, 3, 4), keepdim=True).squeeze(2)
        return torch.cat([x, y.repeat(g, 1, h, w)], 1)


def zoo_stddev(x, group):
    b, _, h, w = x.shape
    g = min(b, group)
    g = b if b % g else g
    if g == 1:
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    y = (torch.var(x.reshape(b // g, g, -1), 1) + 1e-8).sqrt().mean(1)
    return torch.cat([x, y.repeat_interleave(g)[:, None, None, None].expand(b, 1, h, w)], 1)


class MiniBatchStdDev(nn.Module):
    """pytorch_GAN_zoo's function as a layer: runs of samples, unbiased, the whole batch where they don't divide."""

    def __init__(self, subGroupSize=4):
        super().__init__()
        self.subGroupSize = subGroupSize

    def forward(self, x):
        return zoo_stddev(x, self.subGroupSize)


LAYERS = {
    "torchgan": (lambda: MinibatchDiscrimination1d(6, 4, 3), (7, 6)),
    "improved-gan": (lambda: MinibatchLayer(6, 4, 3), (7, 6)),
    "averages": (lambda: MiniBatchDiscrimination(6, 4, 3), (7, 6)),
    "StyleGAN": (lambda: MinibatchStdLayer(4, 2), (8, 4, 3, 3)),
    "StyleGAN, whole batch": (lambda: MinibatchStdLayer(None), (6, 4, 3, 3)),
    "mmgen": (lambda: MiniBatchStddevLayer(2), (6, 4, 3, 3)),
    "mmgen, channels": (lambda: ModMBStddevLayer(4, 2), (8, 4, 3, 3)),
    "GAN_zoo": (lambda: MiniBatchStdDev(4), (8, 4, 3, 3)),
    "GAN_zoo, remainder": (lambda: MiniBatchStdDev(4), (7, 4, 3, 3)),
}


class Everything(nn.Module):
    """Hook and parametrization, activations as modules and as functions, stddev and discrimination, one class for all."""

    def __init__(self, size=8):
        super().__init__()
        self.a = spectral_norm(nn.Conv2d(3, 6, 3, 1, 1))
        self.b = parametrizations.spectral_norm(nn.Conv2d(6, 4, 3, 2, 1))
        self.act, self.std = nn.LeakyReLU(0.2), MinibatchStdLayer(4)
        self.c = nn.Conv2d(5, 2, 3, 1, 1)
        self.mbd = MinibatchDiscrimination1d(2 * (size // 4) ** 2, 3, 2)
        self.out = spectral_norm(nn.Linear(2 * (size // 4) ** 2 + 3, 1))

    def forward(self, x):
        x = self.std(self.act(self.b(F.relu(self.a(x)))))
        return self.out(self.mbd(F.avg_pool2d(F.leaky_relu(self.c(x), 0.1), 2).flatten(1)))


def wgan_gp(critic, real, fake, alpha=0.3):
    """A user's own step, in the most copied form."""
    x = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
    scores = critic(x)
    (g,) = torch.autograd.grad(
        outputs=scores, inputs=x, grad_outputs=torch.ones_like(scores), create_graph=True, retain_graph=True
    )
    penalty = ((g.view(len(g), -1).norm(2, dim=1) - 1) ** 2).mean() * 10
    loss = critic(fake).mean() - critic(real).mean() + penalty
    loss.backward()
    return x, loss


def penalty_alone(critic, real, fake):
    x = torch.lerp(fake, real, 0.3).requires_grad_(True)
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    penalty = g.square().sum((1, 2, 3) if g.dim() == 4 else 1).mean()
    penalty.backward()
    return x, penalty


def r1_r2(critic, real, fake):
    real, fake = real.clone().requires_grad_(True), fake.clone().requires_grad_(True)
    a, b = critic(real), critic(fake)
    gs = [torch.autograd.grad(s.sum(), x, create_graph=True)[0] for s, x in ((a, real), (b, fake))]
    loss = F.softplus(b - a).mean() + sum(g.square().flatten(1).sum(1).mean() for g in gs)
    loss.backward()
    return real, loss


STEPS = (wgan_gp, penalty_alone, r1_r2)


def pair(shape=(8, 3, 8, 8), dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def twins(make, **options):
    """(accelerated, plain, report)."""
    ours, plain = reference.twins(make)
    return ours, plain, fastgan.accelerate(ours, **options)


def assert_same_step(ours, plain, step, data, tolerance=1e-11):
    results = []
    for model in (ours, plain):
        model.zero_grad()
        torch.manual_seed(5)
        x, loss = step(model, *data)
        results.append((loss.detach(), x.grad))
    (a, gx), (b, hx) = results
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (gx is None) == (hx is None)
    if hx is not None:
        torch.testing.assert_close(gx, hx, rtol=tolerance, atol=tolerance)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
    assert reference.error(reference.grads(ours), reference.grads(plain)) <= tolerance
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# What stays


def inventory(model):
    """Everything that restore has to bring back."""
    found = []
    for name, module in model.named_modules():
        hooks = [(type(h), dict(vars(h)) if hasattr(h, "__dict__") else None) for h in module._forward_pre_hooks.values()]
        kinds = [list(vars(module)[key]) for key in vars(module) if "hooks" in key]
        found.append((name, type(module), sorted(vars(module)), hooks, kinds))
    return found


def test_parameters_names_keys_and_hooks_stay_and_restore_undoes_everything():
    torch.manual_seed(0)
    model = Everything()
    model.a.register_forward_pre_hook(lambda *_: None)
    model.a.register_forward_pre_hook(lambda *_: None, prepend=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    before = inventory(model)
    report = fastgan.accelerate(model)
    replaced = {r.name: r.by for r in report.replaced if r.name}
    assert "spectral_norm" in report.replaced[0].by and {"a", "b", "out", "std", "mbd", "act", "c"} <= set(replaced)
    assert not report.skipped
    assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert list(state) == list(model.state_dict()) and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert isinstance(model.mbd, MinibatchDiscrimination1d) and type(model.std).__name__ == "MinibatchStdLayer"
    assert inventory(model) != before
    assert fastgan.restore(model) is model
    assert inventory(model) == before
    assert second_order.note_at_output not in model._forward_hooks.values()


def test_twice_is_once():
    model = Everything()
    fastgan.accelerate(model)
    once = inventory(model)
    again = fastgan.accelerate(model)
    assert not any("second" not in r.by for r in again.replaced) and inventory(model) == once
    fastgan.restore(fastgan.restore(model))


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_a_training_run_of_everything(step):
    ours, plain, _ = twins(Everything)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (ours, plain)]
    for k in range(4):
        assert_same_step(ours, plain, step, pair(seed=k), 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    for m in (ours, plain):
        m.eval()
    torch.testing.assert_close(ours(pair()[0]), plain(pair()[0]), rtol=1e-9, atol=1e-9)


def test_optimizers_made_before_go_on():
    torch.manual_seed(0)
    model = Everything().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fastgan.accelerate(model)
    before = model.mbd.T.detach().clone()
    wgan_gp(model, *pair())
    optimizer.step()
    assert not torch.equal(before, model.mbd.T)


def without_parametrizations():
    model = Everything()
    torch.nn.utils.parametrize.remove_parametrizations(model.b, "weight")  # torch itself can't pickle those
    return model


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_can_be_restored(way):
    ours, plain, _ = twins(without_parametrizations if way != "deepcopy" else Everything)
    wgan_gp(ours, *pair()), wgan_gp(plain, *pair())
    if way == "deepcopy":
        copied = copy.deepcopy(ours)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert served.is_served(copied.mbd) and isinstance(copied.mbd, MinibatchDiscrimination1d)
    assert second_order.note_at_output in copied._forward_hooks.values()
    assert_same_step(copied, plain, wgan_gp, pair(seed=2))
    fastgan.restore(copied)
    assert type(copied.mbd) is MinibatchDiscrimination1d
    assert served.is_served(ours.mbd), "the original is another model"
    wgan_gp(plain, *pair(seed=3)), wgan_gp(copied, *pair(seed=3))


def test_copies_between_torchs_last_forward_and_our_first():
    model = without_parametrizations()
    model(torch.randn(4, 3, 8, 8))
    fastgan.accelerate(model)
    copied = copy.deepcopy(model)  # torch's hook leaves a weight that belongs to a graph
    assert torch.equal(copied.a.weight_orig, model.a.weight_orig)
    copied(torch.randn(4, 3, 8, 8)).sum().backward()


def test_checkpoints_go_both_ways_with_weights_only():
    ours, plain, _ = twins(Everything)
    wgan_gp(ours, *pair())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(pair()[0]), plain(pair()[0]), rtol=1e-11, atol=1e-11)
    ours.load_state_dict(plain.state_dict())


def test_average_of_weights_follows():
    ours, plain, _ = twins(without_parametrizations)
    averages = [
        torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for m in (ours, plain)
    ]
    for k in range(2):
        for model, average in zip((ours, plain), averages, strict=True):
            wgan_gp(model, *pair(seed=k))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
            average.update_parameters(model)
    for a, b in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# Layers


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_other_libraries(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().double()
    ours = copy.deepcopy(plain)
    report = fastgan.accelerate(ours)
    assert any("fastgan.minibatch" in r.by for r in report.replaced), report
    before = torch.get_rng_state()
    x = pair(shape)[0] * 0.2
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        first = torch.autograd.grad((y * y.detach().sin()).square().sum(), [leaf, *layer.parameters()], create_graph=True)
        results.append((y, *first, *torch.autograd.grad(first[0].square().sum(), [leaf, *layer.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert torch.equal(before, torch.get_rng_state())


def test_attributes_of_a_layer_stay_in_force():
    layer = MinibatchStdLayer(4)
    fastgan.accelerate(layer)
    layer.group_size = 2
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(layer(x), MinibatchStdLayer(2)(x))


class MiniBatchSTDLayer(nn.Module):
    """Its group under a name that nobody knows, and a way of its own to be pickled."""

    def __init__(self, how_many=2):
        super().__init__()
        self.how_many = how_many

    def forward(self, x):
        return zoo_stddev(x, self.how_many)

    def __reduce__(self):
        return MiniBatchSTDLayer, (self.how_many,)


def test_unknown_names_and_pickles_of_their_own():
    layer = MiniBatchSTDLayer(2)
    report = fastgan.accelerate(nn.Sequential(layer))
    assert any("contiguous" in r.by for r in report.replaced), report
    x = torch.randn(6, 4, 3, 3)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(x), layer(x))
        fastgan.restore(copied)


def test_a_forward_replaced_on_the_instance_stays():
    layer = MinibatchStdLayer(4)
    layer.forward = lambda x: x
    assert "on the instance" in fastgan.accelerate(layer).skipped[0].why
    x = torch.randn(4, 4, 3, 3)
    assert layer(x) is x


class MinibatchStdOdd(MinibatchStdLayer):
    """Looks like it, computes something else."""

    def forward(self, x):
        return super().forward(x) * 1.01


class BrokenMinibatchDiscrimination(MinibatchDiscrimination1d):
    def forward(self, x):
        raise KeyError("not today")


class L2MinibatchDiscrimination(MinibatchDiscrimination1d):
    def forward(self, x):
        m = torch.mm(x, self.T.view(self.in_features, -1)).view(-1, self.out_features, self.intermediate_features)
        return torch.cat([x, torch.exp(-(m[:, None] - m).square().sum(3)).sum(1) - 1], 1)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (MinibatchStdOdd(4), "something else"),
        (BrokenMinibatchDiscrimination(4, 3, 2), "could not be probed: KeyError"),
        (L2MinibatchDiscrimination(4, 3, 2), "something else"),
        (MiniBatchStddevLayer(4, gather_all_batch=True), "group="),
        (nn.Sequential(MinibatchDiscrimination1d(4, 3, 2).to("meta")), "meta"),
    ],
)
def test_what_only_looks_like_it_is_left(layer, why):
    before = inventory(layer)
    report = fastgan.accelerate(layer)
    assert why in report.skipped[0].why, report
    assert not any("minibatch" in r.by for r in report.replaced)
    fastgan.restore(layer)
    assert inventory(layer) == before


class Subclassed(torch.nn.utils.spectral_norm.__globals__["SpectralNorm"]):
    pass


def test_spectral_norms_that_stay_torchs():
    layer = spectral_norm(nn.Linear(3, 3))
    next(iter(layer._forward_pre_hooks.values())).__class__ = Subclassed
    report = fastgan.accelerate(nn.Sequential(layer))
    assert "subclass" in report.skipped[0].why and report.skipped[0].name == "0"


def test_what_else_is_left_and_why():
    class SNLinear(nn.Linear):
        """Normalises its weight itself, as model zoos do."""

    report = fastgan.accelerate(nn.ModuleList([SNLinear(3, 3), torch.compile(nn.Sequential(nn.Linear(3, 3)))]))
    assert [(s.name, s.why.partition(":")[0].partition(";")[0]) for s in report.skipped] == [
        ("0", "another library's spectral norm"),
        ("1", "compiled already, and runs what was compiled"),
    ]


def test_restore_refuses_while_a_group_serves():
    model = Everything()
    fastgan.accelerate(model)
    group = fastgan.SpectralNormGroup(model)
    before = inventory(model)
    with pytest.raises(RuntimeError, match=r"restore: .*SpectralNormGroup; call remove"):
        fastgan.restore(model)
    assert inventory(model) == before
    group.remove()
    fastgan.restore(model)


# Penalties written by hand


class Functional(nn.Module):
    """No activation modules at all, and in place where that is allowed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = critics.conv(3, 8), critics.conv(8, 8), nn.Linear(8 * 16, 1)

    def forward(self, x):
        x = torch.relu_(self.a(x))
        return self.c(F.max_pool2d(F.leaky_relu(self.b(x), 0.2, inplace=True), 2).flatten(1))


class Tail(nn.Module):
    """Ends with the output of a module within, which sees only a part of the graph."""

    def __init__(self):
        super().__init__()
        self.first = critics.conv(3, 8)
        self.tail = nn.Sequential(critics.conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 1))

    def forward(self, x):
        return self.tail(F.relu(self.first(x)))


def mlp(a, b):
    return nn.Sequential(
        nn.Linear(a, b), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(b, b), nn.LeakyReLU(0.2), nn.Linear(b, 1)
    )


COUNTED = {
    "dcgan": (lambda: critics.DCGAN(8, 16), (6, 3, 16, 16)),
    "sngan": (lambda: critics.SNGAN(8), (6, 3, 32, 32)),
    "r3gan-like": (lambda: critics.R3GAN(8), (6, 3, 32, 32)),
    "functional": (Functional, (6, 3, 8, 8)),
    "tail": (Tail, (6, 3, 8, 8)),
    "ctgan": (lambda: mlp(40, 32), (6, 40)),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_own_penalty_code_costs_ten_units_instead_of_twelve(name):
    make, shape = COUNTED[name]
    ours, plain, _ = twins(make)
    data = pair(shape)
    for step in STEPS:
        assert_same_step(ours, plain, step, data)
    with torch.no_grad():
        unit = flops(lambda: plain(data[0]))
    measured = [flops(lambda m=m: wgan_gp(m, *data)) / unit for m in (ours, plain)]
    assert measured[0] <= 10.1 and measured[1] - measured[0] > 1.8, measured
    alone = [flops(lambda m=m: penalty_alone(m, *data)) / unit for m in (ours, plain)]
    assert alone[0] <= 4.1 and alone[1] > 5.5, alone


@pytest.mark.cpu
def test_small_perceptrons_are_let_be(monkeypatch):
    """Looking for zeros costs more than they do; now and then it is tried again, and other shapes have their own count."""
    monkeypatch.setattr(second_order, "SLIGHT_BELIEVED", 3)
    ours, plain, _ = twins(lambda: mlp(40, 32))
    data = pair((6, 40))
    with torch.no_grad():
        unit = flops(lambda: plain(data[0]))
    cost = lambda model, data=data: flops(lambda: penalty_alone(model, *data)) / unit  # noqa: E731
    most = cost(plain)
    found = [cost(ours) for _ in range(second_order.SLIGHT_SURE + 6)]
    sure, after = found[: second_order.SLIGHT_SURE], found[second_order.SLIGHT_SURE :]
    assert max(sure) < most - 1.5
    assert after[:3] == [most] * 3 and min(after) < most - 1.5 and after.count(most) > 3, after
    assert cost(ours, [x.repeat(2, 1) for x in data]) / 2 < most - 1.5
    assert_same_step(ours, plain, penalty_alone, data)
    monkeypatch.setattr(second_order, "SLIGHT", 1)
    large = copy.deepcopy(ours)
    assert max(cost(large) for _ in range(second_order.SLIGHT_SURE + 2)) < most - 1.5


FURTHER = {
    "abs of a spectrum": lambda: critics.with_layer(critics.Lambda(lambda x: torch.fft.rfft2(x).abs())),
    "avg pool in one dimension": lambda: critics.with_layer(nn.Sequential(nn.Flatten(2), nn.AvgPool1d(3), nn.MaxPool1d(2))),
    "threshold and shrink": lambda: critics.with_layer(nn.Sequential(nn.Threshold(0.1, 0.0), nn.Softshrink(0.2))),
    "replication pad": lambda: critics.with_layer(nn.Sequential(nn.ReplicationPad2d(2), nn.FractionalMaxPool2d(2, 4))),
    "adaptive max pool": lambda: critics.with_layer(nn.AdaptiveMaxPool2d(3)),
    "3-D": lambda: critics.with_layer(
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ReplicationPad3d(1), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(2))
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(critics.conv(3, 4), nn.Sequential(nn.ReLU())), nn.Sequential(nn.Sequential(critics.head(4), nn.ReLU()))
    ),
}
EVERY = critics.SHARED | critics.CURVED | critics.COUPLED | {f"further: {name}": make for name, make in FURTHER.items()}


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_layer(name):
    make = EVERY[name]
    torch.manual_seed(0)
    ours = make().double()
    torch.manual_seed(0)
    plain = make().double()  # not a copy: torch's old weight norm has none
    data = [critics.images(size=16 if "gan" in name else 8) for _ in range(2)]
    ours(data[0]), plain(data[0])  # lazy layers
    ours.load_state_dict(plain.state_dict())
    fastgan.accelerate(ours)
    for step in STEPS:
        assert_same_step(ours, plain, step, data, 1e-9)


def test_only_what_nothing_else_reaches_is_given_zeros(monkeypatch):
    given = []
    cut = second_order._cut
    monkeypatch.setattr(second_order, "_cut", lambda expected, below: given.append(below) or cut(expected, below))
    model = critics.SNGAN(4, parametrizations.spectral_norm).double()
    fastgan.accelerate(model)
    penalty_alone(model, *pair((4, 3, 32, 32)))
    shapes = [tuple(t.shape) for below in given for t in below]
    assert shapes.count((4, 3, 32, 32)) >= 1 and set(shapes) == {(4,), (4, 3, 32, 32)}  # biases and the input: no weights


def test_labels_and_branches_without_the_input():
    """Zeros reach parameters beside the path from the input, in eager PyTorch: they have to go on doing so."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Linear(3, 8), nn.Linear(8, 8)
            self.a, self.out, self.unused = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(2, 2)

        def forward(self, x, y):
            return self.out(F.relu(self.a(x) + F.relu(self.mix(F.relu(self.embed(y))))))

    ours, plain, _ = twins(Conditional)
    y = torch.randn(8, 3, dtype=torch.float64)
    for step in STEPS:
        results = []
        for model in (ours, plain):
            model.zero_grad()
            step(lambda x, model=model: model(x, y), *pair((8, 6)))
            results.append(reference.grads(model))
        assert [g is None for g in results[0]] == [g is None for g in results[1]]
        assert reference.error(*results) <= 1e-12


def test_gradients_reach_a_generator_that_was_not_detached():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 6), nn.SiLU()).double()
    ours, plain, _ = twins(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
    results = []
    for critic in (ours, plain):
        x = generator(torch.ones(3, 4, dtype=torch.float64) * torch.arange(1, 4)[:, None])
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        wanted = [*generator.parameters(), *critic.parameters()]
        results.append(torch.autograd.grad(g.square().sum(), wanted, allow_unused=True))
    assert [g is None for g in results[0]] == [g is None for g in results[1]]
    assert reference.error(*results) <= 1e-12


def gradient_with_graph(critic, x):
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return g


def test_graphs_are_kept_as_asked():
    ours, plain, _ = twins(Functional)
    x = pair()[0].requires_grad_()
    g = gradient_with_graph(ours, x)
    first = torch.autograd.grad(g.square().sum(), list(ours.parameters())[:3], retain_graph=True)
    again = torch.autograd.grad(g.square().sum(), list(ours.parameters())[:3])
    assert reference.error(first, again) == 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(g.square().sum(), list(ours.parameters())[:3])
    expected = torch.autograd.grad(gradient_with_graph(plain, x).square().sum(), list(plain.parameters())[:3])
    assert reference.error(first, expected) <= 1e-12


def test_third_derivatives():
    def third(critic):
        x = pair()[0].requires_grad_()
        second = torch.autograd.grad(gradient_with_graph(critic, x).square().sum(), critic.a.weight, create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), list(critic.parameters()), allow_unused=True)

    ours, plain, _ = twins(Functional)
    assert reference.error(third(ours), third(plain)) <= 1e-11


def test_after_an_error_in_a_forward():
    ours, plain, _ = twins(Functional)
    with pytest.raises(RuntimeError):
        ours(torch.zeros(4, 3, 6, 6, dtype=torch.float64))
    unit = flops(lambda: plain(pair()[0]))
    assert_same_step(ours, plain, penalty_alone, pair())
    assert flops(lambda: penalty_alone(ours, *pair())) < flops(lambda: penalty_alone(plain, *pair())) - unit


def test_parts_called_by_themselves_and_the_same_input_again():
    make = lambda: nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.Linear(6, 5), nn.ReLU()), "b": mlp(5, 4)})  # noqa: E731
    ours, plain, _ = twins(make)
    kept = [torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).requires_grad_() for _ in range(2)]
    for _ in range(2):
        for model, x in zip((ours, plain), kept, strict=True):
            model.zero_grad()
            x.grad = None
            torch.manual_seed(0)
            (g,) = torch.autograd.grad(model["b"](model["a"](x)).sum(), x, create_graph=True)
            g.square().sum().backward()
        assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in plain.parameters()]
        assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-12
        torch.testing.assert_close(kept[0].grad, kept[1].grad)


@pytest.mark.cpu
def test_nothing_is_kept_alive():
    model = Everything().double()
    fastgan.accelerate(model)
    gc.collect()
    gc.disable()
    try:
        x = pair()[0].requires_grad_()
        g = gradient_with_graph(model, x)
        penalty = g.square().sum()
        alive = [weakref.ref(t) for t in (x, g, penalty)]
        del x, g, penalty
        assert [r() for r in alive] == [None] * 3
    finally:
        gc.enable()


def test_transforms_batched_gradients_checkpoints_and_compile():
    ours, plain, _ = twins(Functional)
    x = pair()[0]
    for function in (
        lambda m: torch.func.grad(lambda x: torch.func.grad(lambda x: m(x).sum())(x).square().sum())(x),
        lambda m: torch.func.jvp(lambda x: m(x), (x,), (x,))[1],
        lambda m: torch.autograd.grad(
            m(x.requires_grad_()), x, torch.eye(8, dtype=x.dtype)[..., None], is_grads_batched=True, create_graph=True
        )[0],
    ):
        torch.testing.assert_close(function(ours), function(plain), rtol=1e-11, atol=1e-11)
    for step in STEPS:
        results = []
        for m in (ours, plain):
            m.zero_grad()
            step(lambda x, m=m: checkpoint(m, x, use_reentrant=False), *pair())
            results.append(reference.grads(m))
        assert [g is None for g in results[0]] == [g is None for g in results[1]]
        assert reference.error(*results) <= 1e-11
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    ours, plain = reference.twins(Everything, dtype=torch.float32)
    exact = copy.deepcopy(plain).double()
    fastgan.accelerate(ours)
    data = pair(dtype=torch.float32)
    for model in (ours, plain):
        with torch.autocast("cpu", dtype):
            wgan_gp(model, *data)
    wgan_gp(exact, *pair())
    want = reference.grads(exact)
    assert reference.error(reference.grads(ours), want) <= 2 * reference.error(reference.grads(plain), want) + 1e-6


def test_grad_scaler():
    ours, plain, _ = twins(Everything)
    results = []
    for model in (ours, plain):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        x = torch.lerp(*pair(), 0.3).requires_grad_()
        (g,) = torch.autograd.grad(scaler.scale(model(x).sum()), x, create_graph=True)
        g = g / scaler.get_scale()
        scaler.scale(g.square().flatten(1).sum(1).mean() + model(pair()[0]).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_critic_step_shares_as_before():
    ours, plain, _ = twins(lambda: critics.DCGAN(4, 16))
    real, fake = pair((4, 3, 16, 16))
    options = {"r1": 1.0, "r2": 1.0, "loss": "relativistic"}
    for k in range(3):
        for m in (ours, plain):
            m.zero_grad()
            step = fastgan.critic_step(m, real, fake, **options)
            step.loss.backward()
            assert step.method == "fused", step.why
        assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-11, k


def test_the_critic_step_compiles_as_before():
    ours, plain, _ = twins(lambda: critics.DCGAN(4, 16))
    data = pair((4, 3, 16, 16))
    for _ in range(3):
        for m in (ours, plain):
            m.zero_grad()
            fastgan.critic_step(m, *data, r1=1.0, loss="hinge", compile="eager").loss.backward()
        assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-11


def test_anomaly_detection_and_saved_tensor_hooks():
    ours, plain, _ = twins(Functional)
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    ):
        assert_same_step(ours, plain, wgan_gp, pair())


def test_path_length_of_a_generator():
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 12), nn.Unflatten(1, (3, 2, 2)))  # noqa: E731
    ours, plain, _ = twins(make)
    for m in (ours, plain):
        w = torch.ones(3, 4, dtype=torch.float64).cumsum(0).requires_grad_()
        image = m(w)
        (g,) = torch.autograd.grad((image * image.detach().cos()).sum(), w, create_graph=True)
        g.square().sum().backward()
    assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in plain.parameters()]
    assert reference.error(reference.grads(ours), reference.grads(plain)) <= 1e-12


# Verification and report


def test_verify_leaves_buffers_gradients_and_random_state():
    torch.manual_seed(0)
    model = nn.Sequential(Everything(), nn.Dropout(0.5))
    wgan_gp(model, *pair(dtype=torch.float32))
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random_state = torch.get_rng_state()
    report = fastgan.accelerate(model, verify=True, example_inputs=torch.randn(8, 3, 8, 8, generator=torch.Generator()))
    assert "penalty's gradients agree" in report.verified and not report.skipped
    fastgan.restore(model)
    fastgan.accelerate(model, verify=True)  # a guessed batch moves nothing either
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(
        torch.equal(a, b) for a, b in zip(grads, (p.grad for p in model.parameters() if p.grad is not None), strict=True)
    )


@pytest.mark.parametrize(("kind", "where"), [("discrimination", "mbd"), ("stddev", "std")])
def test_verify_refuses_a_swap_that_differs(monkeypatch, kind, where):
    """This one and no other, where the probe of the layer alone saw nothing."""

    def slightly_wrong(base, kind_, options):
        if kind_ != kind:
            return right(base, kind_, options)
        return type(base.__name__, (base,), {"forward": lambda self, x: base.forward(self, x) * 1.01, "_fastgan_base": base})

    right = served.served
    monkeypatch.setattr(served, "served", slightly_wrong)
    model = Everything().double()
    before = inventory(model)
    report = fastgan.accelerate(model, verify=True, example_inputs=pair()[0])
    (skipped,) = report.skipped
    assert skipped.name == where and "refused by the probe: outputs differ" in skipped.why
    assert {"a", "b", "out", "mbd", "std"} - {where} <= {r.name for r in report.replaced}
    fastgan.restore(model)
    assert inventory(model) == before


def test_verify_needs_a_batch_where_none_can_be_guessed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x, y):
            return self.layer(x * y)

    model = Odd()
    before = inventory(model)
    with pytest.raises(ValueError, match=r"verify=True needs a batch.*example_inputs=images"):
        fastgan.accelerate(model, verify=True)
    assert inventory(model) == before
    fastgan.accelerate(model, verify=True, example_inputs=(torch.randn(4, 3), torch.randn(4, 3)))
    for guessable in (
        critics.DCGAN(4, 16),
        nn.Sequential(nn.Linear(5, 1)),
        nn.Sequential(nn.Conv1d(2, 3, 5), nn.AdaptiveAvgPool1d(1)),
    ):
        assert "agree" in fastgan.accelerate(guessable, verify=True).verified


def test_only_modules():
    for function in (fastgan.accelerate, fastgan.restore):
        with pytest.raises(TypeError, match=r"expected .*torch\.nn\.Module"):
            function([nn.Linear(2, 2)])


def test_the_report_prints_as_a_table():
    text = str(fastgan.accelerate(nn.Sequential(Everything(), MinibatchStdOdd(4))))
    assert "MinibatchDiscrimination1d" in text and "fastgan.minibatch_discrimination" in text
    assert "left" in text and "MinibatchStdOdd" in text
    assert str(fastgan.accelerate(nn.Sequential())).startswith("replaced")
