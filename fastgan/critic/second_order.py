r"""Double backward without zeros.

``autograd.grad(critic(x).sum(), x, create_graph=True)`` differentiates the critic's backward pass, and with it each
operation's. The gradient of a ReLU or a pooling does not move with its input: the second derivative is 0. PyTorch returns
that 0 as a dense tensor, and autograd then pushes it down through every layer below: two of the twelve units of arithmetic
of a WGAN-GP step, all of them spent on zeros.

A note is left at the critic's output. Only once somebody differentiates with ``create_graph=True`` the graph below is walked,
and each such operation's gradient is replaced by itself with one edge less. Forward passes, ordinary gradients, and what the
graph consists of stay as they are. Parameters that nothing but those zeros would reach (biases) get a zero all the same, so
that ``.grad`` is None or 0 for the same parameters as without.
"""

import math
import threading
import weakref

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

aten = torch.ops.aten

#: operation -> name of its gradient's node, whose edge 1 leads to the operation's input, where it sends zeros
_EMITTERS = {
    "Relu": "ThresholdBackwardBackward",
    "Threshold": "ThresholdBackwardBackward",
    "Abs": "MulBackward",
    "PreluKernel": "PreluKernelBackwardBackward",
} | {
    op: f"{op}BackwardBackward"
    for op in """LeakyRelu Hardtanh Softshrink Hardshrink RreluWithNoise AvgPool2D AvgPool3D AdaptiveAvgPool2D
    AdaptiveAvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D
    FractionalMaxPool3D ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
    ReplicationPad3D""".split()  # noqa: SIM905
}
#: products: a parameter beside an input-dependent factor gets a gradient of its own
_FACTORS = {"Convolution": (0, 1), "Addmm": (1, 2), "Mm": (0, 1), "Bmm": (0, 1), "Baddbmm": (1, 2), "Mul": (0, 1), "Mv": (0, 1)}
#: Below so many multiply-adds of a perceptron on a CPU, zeros cost less than looking for them: measured at 64 to 512 features.
SLIGHT = 1 << 23
SLIGHT_SURE, SLIGHT_BELIEVED = 16, 1024  # graphs of a kind until that is believed, and after which one is looked at again
_MOST_SHAPES = 64
_slight = weakref.WeakKeyDictionary()  # module -> {shapes of its inputs: how many such graphs}
_NOTE, _SEEN = "fastgan: output of", "fastgan: looked at"
_TWICE = "Trying to backward through the graph of a gradient a second time; specify retain_graph=True the first time"


def _op(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")


def _without_zeros(n2, gg):
    """What the gradient's node hands to the incoming gradient and to a weight, without the zeros that the input would get."""
    name = n2.name()
    if name.startswith("ThresholdBackward"):
        return aten.threshold_backward(gg, n2._saved_self, n2._saved_threshold), None
    if name.startswith("LeakyReluBackward"):
        return aten.leaky_relu_backward(gg, n2._saved_self, n2._saved_negative_slope, False), None
    first, _, *rest = n2(gg, *(None,) * (len(n2._input_metadata) - 1))
    return first, rest[0] if rest else None


class _OneEdgeLess(torch.autograd.Function):
    """The gradient that an operation sends to its input, as a function of the gradient that arrives and its weight alone.

    ``below``: tensors that would have got zeros, and get them from here.
    """

    @staticmethod
    def forward(ctx, n2, sent, arrived, weight, *below):
        ctx.n2, ctx.below = n2, [(t.shape, t.dtype, t.device) for t in below]
        ctx.set_materialize_grads(False)
        return sent

    @staticmethod
    def backward(ctx, gg):
        if gg is None:
            return (None,) * (4 + len(ctx.below))
        if ctx.n2 is None:
            raise RuntimeError(_TWICE)
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        first, second = _without_zeros(ctx.n2, gg) if wanted else (None, None)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.n2 = None
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.below)
        return None, None, first, second, *zeros


class _Convolution(torch.autograd.Function):
    """The same for a convolution. It sends no zeros, but PyTorch takes the weight's part of its second derivative as a
    convolution of transposes, up to twice as slow as the weight gradient that it is."""

    @staticmethod
    def forward(ctx, n2, sent, arrived, weight):
        ctx.n2 = n2
        ctx.set_materialize_grads(False)
        return sent

    @staticmethod
    def backward(ctx, gg):
        if gg is None:
            return None, None, None, None
        n2 = ctx.n2
        if n2 is None:
            raise RuntimeError(_TWICE)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.n2 = None
        weight, transposed, groups = n2._saved_weight, n2._saved_transposed, n2._saved_groups
        where = n2._saved_stride, n2._saved_padding, n2._saved_dilation, transposed, n2._saved_output_padding, groups
        first = second = None
        if ctx.needs_input_grad[2]:
            first = aten.convolution(gg, weight, None, *where)
        if ctx.needs_input_grad[3]:
            second = aten.convolution_backward(n2._saved_grad_output, gg, weight, None, *where, (False, True, False))[1]
        return None, None, first, second


def _faster_convolution(sent, arrived):
    """A post-hook of a convolution's node."""
    if not torch.is_grad_enabled() or sent[0] is None:
        return None
    n2 = sent[0].grad_fn
    if n2 is None or not n2.name().startswith("ConvolutionBackwardBackward") or _special():
        return None
    return _Convolution.apply(n2, sent[0].detach(), arrived[0], n2._saved_weight), *sent[1:]


def _cut(expected, below):
    """A post-hook of an emitter's node."""

    def hook(sent, arrived):
        if not torch.is_grad_enabled() or sent[0] is None:
            return None
        n2 = sent[0].grad_fn
        if n2 is None or not n2.name().startswith(expected) or sent[0].is_complex() or _special():
            return None  # of complex numbers, abs is curved
        weight = n2._saved_weight if expected.startswith("Prelu") else None
        return _OneEdgeLess.apply(n2, sent[0].detach(), arrived[0], weight, *below), *sent[1:]

    return hook


def _special() -> bool:
    """Within transforms and traces, which have rules of their own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


class _Region:
    """The graph between a module's outputs and its inputs."""

    def __init__(self, read, emits, inputs, kinds, shapes):
        #: what the output's node reads. Nothing here refers to that node itself, which would keep itself alive.
        self.read = read
        #: whether that node is an emitter, and what is below it then: a list that its hook has too
        self.emits, self.below_output = emits, []
        #: edge -> input tensor
        self.inputs = inputs
        #: of the module's :data:`_slight`, and the key there
        self.kinds, self.shapes = kinds, shapes
        self.looked = False

    def __call__(self, grads):
        if not self.looked and torch.is_grad_enabled() and not _special():
            self.look()

    def look(self):
        self.looked = True
        edges = self.edges = {}  # node -> what it reads; parents before children, reversed below
        order, stack = [], [n for n, nr in self.read if n is not None and (n, nr) not in self.inputs]
        while stack:
            node = stack.pop()
            if node is None:  # what lies below the node pushed before this mark is done
                order.append(stack.pop())
            elif node not in edges:
                edges[node] = read = node.next_functions
                stack += (node, None)
                stack += [n for n, nr in read if n is not None and n not in edges and (n, nr) not in self.inputs]
        dependent = self.dependent = set()
        for node in order:
            if any(edge in self.inputs or edge[0] in dependent for edge in edges[node]):
                dependent.add(node)
        self.ops = {node: _op(node.name()) for node in dependent}
        if self.kinds is not None and _is_slight(self.ops):
            if len(self.kinds) >= _MOST_SHAPES:
                self.kinds.clear()
            self.kinds[self.shapes] = self.kinds.get(self.shapes, 0) + 1
        if self.emits:
            self.below_output[:] = self.below(self.read[0])
        for node in self.ops:
            metadata = node.metadata
            if _SEEN in metadata:
                continue
            metadata[_SEEN] = True
            op, within = self.ops[node], metadata.get(_NOTE)
            if within is not None:
                within.looked = True
            if op in _EMITTERS:
                below = self.below(edges[node][0])
                if within is None:
                    node.register_hook(_cut(_EMITTERS[op], below))
                else:  # the output of a module within, which has its hook already
                    within.below_output[:] = below
            elif op == "Convolution" and within is None:
                node.register_hook(_faster_convolution)
        del self.edges, self.dependent, self.ops

    def below(self, edge):
        """Tensors that get zeros along an emitter's edge to its input, down to the next emitters."""
        found, visited, stack = [], set(), [edge]
        while stack:
            edge = stack.pop()
            node = edge[0]
            if edge in self.inputs:
                found.append(self.inputs[edge])
            elif node is not None and node not in visited:
                visited.add(node)
                if node not in self.dependent:
                    if hasattr(node, "variable"):  # the end: a leaf
                        found.append(node.variable)
                    stack += self.edges[node]
                elif self.ops[node] not in _EMITTERS:
                    factors = _FACTORS.get(self.ops[node], ())
                    stack += [
                        e
                        for k, e in enumerate(self.edges[node])
                        if k not in factors or e in self.inputs or e[0] in self.dependent
                    ]
        return found


def _is_slight(ops: dict) -> bool:
    """A perceptron of so few multiply-adds that its zeros may stay."""
    work = 0
    for node, op in ops.items():
        if op in ("Convolution", "Bmm", "Baddbmm"):
            return False
        if op in ("Addmm", "Mm"):
            output = node._input_metadata[0]
            if output.device.type != "cpu":
                return False
            inner = (node._saved_mat1_sym_sizes if op == "Addmm" else node._saved_self_sym_sizes)[1]
            work += math.prod(output.shape) * inner
    return 0 < work < SLIGHT


def _let_be(kinds: dict, shapes) -> bool:
    """Are graphs of this kind known to be slight? Now and then one is looked at again: a module may change."""
    count = kinds.get(shapes, 0)
    if count < SLIGHT_SURE:
        return False
    kinds[shapes] = count + 1 if count < SLIGHT_SURE + SLIGHT_BELIEVED else SLIGHT_SURE - 1
    return True


def _tensors(tree) -> list:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [t for part in tree for t in _tensors(part)]


class _Calls(threading.local):
    """How many calls of modules with these hooks are going on, one within the other."""

    depth = 0


_calls = _Calls()


def enter(module: nn.Module, args) -> None:
    """Forward pre-hook of a module with :func:`note_at_output`, before all others."""
    if not torch.compiler.is_compiling():
        _calls.depth += 1


def note_at_output(module: nn.Module, args, kwargs, output) -> None:
    """As a forward hook of a module, with its keyword arguments and after errors too: the outermost call's output is noted."""
    if torch.compiler.is_compiling():
        return
    _calls.depth = depth = max(0, _calls.depth - 1)
    if depth == 0 and torch.is_grad_enabled():
        inputs = [t for t in _tensors(args) + _tensors(kwargs) if t.requires_grad]
        if inputs:
            note(_tensors(output), inputs, module)


def note(outputs: list, inputs: list, owner: nn.Module | None = None) -> None:
    """What is differentiated twice from here on, between ``outputs`` and ``inputs``, is so without zeros; unless this has been
    found not to pay for ``owner``, whose outputs they are."""
    if not inputs or _special():
        return
    kinds = shapes = None
    if isinstance(owner, nn.Module):
        kinds, shapes = _slight.setdefault(owner, {}), tuple(t.shape for t in inputs)
        if _let_be(kinds, shapes):
            return
    edges = _edges_of(inputs)
    for node in {t.grad_fn for t in outputs} - {None}:
        known = node.metadata.get(_NOTE)
        if known is not None:  # also the output of another call
            known.inputs = edges
        elif node.next_functions and not any(edge[0] is node for edge in edges):
            op = _op(node.name())
            node.metadata[_NOTE] = region = _Region(node.next_functions, op in _EMITTERS, edges, kinds, shapes)
            node.register_prehook(region)
            if region.emits:
                node.register_hook(_cut(_EMITTERS[op], region.below_output))
            elif op == "Convolution":
                node.register_hook(_faster_convolution)


def _edges_of(inputs):
    return {(edge.node, edge.output_nr): t for edge, t in ((get_gradient_edge(t), t) for t in inputs)}
