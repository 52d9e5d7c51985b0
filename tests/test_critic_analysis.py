"""What the analysis of graphs concludes, and what it is keyed on."""

import critics
import pytest
import torch
import torch.nn as nn

import fastgan
from fastgan.critic import engine
from fastgan.critic.analyse import Graph, analyse, op_name
from fastgan.critic.forward import Forward
from fastgan.critic.probe import find_layouts, spread

torch.set_num_threads(1)


def plan_of(critic, x):
    forward = Forward(critic, x)
    scores = [s for s in forward.scores if s.grad_fn is not None]
    return analyse(Graph(scores), scores, torch.autograd.graph.get_gradient_edge(forward.x).node)


def size_of(name):
    return 32 if name.startswith("sngan") else 16 if name == "dcgan" else 8


@pytest.mark.parametrize("name", critics.SHARED)
def test_accepted(name):
    assert plan_of(critics.SHARED[name]().double(), critics.images(4, size_of(name))).refusal is None


@pytest.mark.parametrize(
    "name, node",
    [
        ("silu", "Silu"),
        ("gelu", "Gelu"),
        ("softplus", "Softplus"),
        ("tanh", "Tanh"),
        ("layer norm", "NativeLayerNorm"),
        ("batch norm train", "statistics of the batch"),
        ("square", "both depend on the input"),
        ("self gating", "both depend on the input"),
        ("minibatch stddev", "Backward0"),
        ("minibatch discrimination", "Exp"),
    ],
)
def test_refused_with_the_reason(name, node):
    plan = plan_of(critics.CURVED[name]().double(), critics.images())
    assert node in plan.refusal and "output shape" in plan.refusal


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x, p: x / (x.abs() + 1), "divides"),
        (lambda x, p: torch.nn.functional.conv2d(x, x[:1]), "filter"),
        (lambda x, p: x.flatten(1) @ x.flatten(1).t(), "both depend"),
        (lambda x, p: torch.nn.functional.grid_sample(x, x[..., :2].clone()), "grid"),
        (lambda x, p: x.pow(3), "Pow"),
        (lambda x, p: torch.sigmoid(x) * p, "Sigmoid"),
    ],
)
def test_products_of_the_input_with_itself(function, reason):
    critic = critics.WithParameter(torch.ones(1), lambda x, p: (function(x, p).flatten(1) * p).sum(1)).double()
    assert reason in plan_of(critic, critics.images(3)).refusal


def test_own_functions_are_not_trusted():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    critic = critics.with_layer(critics.Lambda(Twice.apply)).double()
    plan = plan_of(critic, critics.images())
    assert "TwiceBackward" in plan.refusal and plan.opaque == ("TwiceBackward",)


def test_op_names():
    assert op_name("ConvolutionBackward0") == "Convolution"
    assert op_name("_DDPSinkBackward") == "Clone"
    assert op_name("CompiledFunctionBackward") is None
    assert op_name("CopySlices") is None


def signature(critic, x):
    forward = Forward(critic, x)
    return Graph(forward.scores).signature(forward.scores, forward.x)


def test_signature_sees_everything_that_matters():
    torch.manual_seed(0)
    base, head = critics.conv(3, 4).double(), critics.head(4).double()
    x = critics.images()
    same = lambda f: signature(lambda x: head(f(base(x))), x)  # noqa: E731
    plain = same(lambda h: h.roll(1, 1))
    assert plain == same(lambda h: h.roll(1, 1))
    for other in (
        lambda h: h.roll(1, 0),
        lambda h: h.roll(2, 1),
        lambda h: h.flip(1),
        lambda h: h.roll(1, 1) + h,
        lambda h: nn.functional.leaky_relu(h, 0.1),
    ):
        assert same(other) != plain
    assert same(lambda h: nn.functional.leaky_relu(h, 0.1)) != same(lambda h: nn.functional.leaky_relu(h, 0.2))
    assert signature(lambda x: head(base(x).roll(1, 1)), x[:2]) != plain


def test_layouts_are_found_and_batch_size_ambiguity_is_resolved():
    critic = critics.SHARED["merged batch"]().double()
    critic(critics.images())
    for b in (3, 4, 6, 8):
        forward = Forward(critic, critics.images(b))
        graph, plan = engine.plan_for(forward)
        run = engine.SharedPass(forward, graph, plan, [1.0])
        layouts = run.prove_layouts()
        merged = [
            layout[0]
            for layout, tap in zip(layouts, plan.taps, strict=False)
            if graph.nodes[tap.position]._input_metadata[0].shape[0] == 6 * b
        ]
        assert merged == [(0, True, 6)]
    assert find_layouts(graph.nodes, plan.taps, run._backward, b) == layouts


def test_spread():
    s = torch.tensor([1.0, 2.0])
    t = torch.zeros(4, 3)
    assert spread(s, t, (0, True, 2)).flatten().tolist() == [1, 1, 2, 2]
    assert spread(s, t, (0, False, 2)).flatten().tolist() == [1, 2, 1, 2]
    assert spread(s, torch.zeros(3, 2), (1, True, 1)).shape == (1, 2)


def test_probe_keeps_its_hands_off_the_global_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    forward = Forward(critics.SharedConv().double(), critics.images())
    state = torch.get_rng_state()
    graph, plan = engine.plan_for(forward)
    engine.SharedPass(forward, graph, plan, [1.0]).prove_layouts()
    assert torch.equal(state, torch.get_rng_state())


def test_plans_are_bounded_and_forgotten_with_their_critic():
    critic = critics.SharedConv().double()
    for side in range(4, 4 + 70):
        engine.plan_for(Forward(critic, torch.randn(1, 3, side, 4, dtype=torch.float64)))
    assert len(engine._PLANS[critic]) == 64
    engine.forget_plans(critic)
    assert critic not in engine._PLANS


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(critics.conv(3, 4), nn.LeakyReLU(0.2), critics.conv(4, 4))
        self.gate, self.out = nn.SiLU(), critics.head(4)

    def forward(self, x):
        return self.out(self.gate(self.body(x)))


def test_explain_names_the_part_that_stands_in_the_way():
    critic = Gated().double()
    found = fastgan.explain(critic, critics.images())
    assert found.method == found.penalty_method == "double_backward" and "Silu" in found.why
    assert {p.name: p.linear for p in found.parts}["gate"] is False
    assert all(p.linear for p in found.parts if p.name != "gate")
    assert "gate" in str(found) and "Silu" in str(found)


def test_explain_accepts():
    found = fastgan.explain(critics.Projection().double(), critics.images(), torch.tensor([0, 1, 2, 1]))
    assert found.method == found.penalty_method == "fused" and found.units == 4
    assert "independent" in found.why and all(p.linear for p in found.parts)
    assert fastgan.explain(lambda x: x.flatten(1).relu().sum(1), critics.images()).method == "fused"


def test_explain_sees_coupling_and_patches():
    found = fastgan.explain(critics.COUPLED["batch mean"]().double(), critics.images())
    assert found.method == "double_backward" and found.penalty_method == "fused" and "coupled" in found.why
    patch = nn.Sequential(critics.conv(3, 4), nn.ReLU(), critics.conv(4, 1)).double()
    assert fastgan.explain(patch, critics.images(), loss_per_sample=False).method == "double_backward"
    assert "constant over the scores" in fastgan.explain(patch, critics.images()).why


def test_explain_says_where_forward_mode_serves():
    critic = nn.Sequential(
        critics.Lambda(lambda x: nn.functional.scaled_dot_product_attention(x, x, x)), critics.LazyHead()
    ).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        critic(critics.images(size=4))
        found = fastgan.explain(critic, critics.images(size=4))
    assert found.method == found.penalty_method == "jvp" and "differentiated twice" in found.why and found.units == 10


def test_explain_leaves_no_trace():
    critic = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(critics.conv(3, 4)), nn.BatchNorm2d(4), nn.Dropout(), critics.head(4)
    ).double()
    buffers = [b.clone() for b in critic.buffers()]
    state = torch.get_rng_state()
    fastgan.explain(critic, critics.images())
    torch.set_rng_state(state)
    x = critics.images()
    state = torch.get_rng_state()
    fastgan.explain(critic, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, critic.buffers(), strict=False))
    assert all(p.grad is None for p in critic.parameters())
    with pytest.raises(TypeError, match="example batch"):
        fastgan.explain(critic)
