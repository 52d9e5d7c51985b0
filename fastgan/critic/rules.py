"""What the shared pass knows about each operation of the autograd graph.

A rule serves one kind of graph node whose input-dependent operands enter (piecewise) linearly. It gives

``tangent``            the tangent of the node's output from the tangents of its input-dependent operands;
``weight_gradients``   for products with a parameter: the parameter's gradient from the output cotangent d and
                       u = s * a + t, where a is the operand, t its tangent and s dLoss/dscore of each sample;
``bias_gradients``     for parameters that are added or joined: their gradient from s * d.

Tangents of operations without a formula here come from transposing twice: a node's backward is linear in its argument,
so differentiating *it* along the tangents is the forward map.
"""

import torch

aten = torch.ops.aten

FEW_CHANNELS = 4

# Piecewise linear operations, and linear ones; transposed twice unless a formula is registered below.
PIECEWISE = frozenset(
    """Relu LeakyRelu Hardtanh Clamp ClampMin ClampMax Threshold Abs PreluKernel RreluWithNoise Max Min Amax Amin
    Maximum Minimum MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D
    FractionalMaxPool2D Hardsigmoid Softshrink Hardshrink Sort Topk Kthvalue Median""".split()  # noqa: SIM905
)
LINEAR = frozenset(
    """Neg View UnsafeView ReshapeAlias Reshape Expand Permute Transpose T Squeeze Unsqueeze Slice Select Index
    IndexSelect Gather Cat Stack Split SplitWithSizes UnsafeSplit Unbind Sum Mean Clone ToCopy Alias Diagonal Flip
    Roll Repeat Unfold Im2Col Col2Im ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D
    ReplicationPad1D ReplicationPad2D ReplicationPad3D PixelShuffle PixelUnshuffle ChannelShuffle
    NativeChannelShuffle AvgPool2D AvgPool3D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool3D
    UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact2D UpsampleLinear1D
    UpsampleBilinear2D UpsampleBilinear2DAa UpsampleBicubic2D UpsampleTrilinear3D MaskedFill NativeDropout FftR2C
    FftC2C FftC2R ViewAsReal ViewAsComplex Cumsum Tril Triu Where Rsub Add Sub Mul Div Movedim""".split()  # noqa: SIM905
)
# Operations linear in the input and a parameter jointly: both are copied, added or selected, never multiplied.
JOINT = frozenset(("Add", "Sub", "Rsub", "Cat", "Stack", "Where", "Maximum", "Minimum", "MaskedFill"))
# Operations that pick by tensors of indices: the same graph may connect other samples in the next step.
VALUE_DEPENDENT = frozenset(("Index", "IndexSelect", "Gather", "Sort", "Topk", "Kthvalue", "Median"))
# Where central differences are wrong: the derivative jumps.
KINKS = PIECEWISE | frozenset(["Hardswish", "MaxUnpool2D", "Cdist", "PdistForward", "Sgn", "Round", "Where", "MaskedFill"])


def has_kink(op, node):
    """Does the derivative of this operation jump somewhere? ``where`` and masks count: they are how kinks are written
    out by hand."""
    if op == "Elu":  # smooth only if both slopes at 0 agree; SELU's do not
        return node._saved_alpha * node._saved_input_scale != 1.0
    return op in KINKS


def edge_metadata(node, slot):
    """Shape and dtype of what a graph node reads at one position."""
    source, nr = node.next_functions[slot]
    return source._input_metadata[nr]


def reduce_to(grad, node, slot):
    """Sum a gradient over the dimensions in which its operand was broadcast."""
    shape = tuple(edge_metadata(node, slot).shape)
    return grad if grad.shape == shape else grad.sum_to_size(shape)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def transpose_twice(node, slots, tangents):
    """Tangents of all of a linear node's outputs from those of its inputs at ``slots``."""
    with torch.enable_grad():
        seeds = [torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) for m in node._input_metadata]
        for v in seeds:
            if v.is_floating_point() or v.is_complex():
                v.requires_grad_(True)
        returned = as_tuple(node(*seeds))
        grads, given = [], []
        for slot, t in zip(slots, tangents, strict=False):
            g = returned[slot]
            if t is not None and g is not None and g.requires_grad:
                grads.append(reduce_to(g, node, slot).to(edge_metadata(node, slot).dtype))
                given.append(t)
    wanted = [v for v in seeds if v.requires_grad]
    found = iter(torch.autograd.grad(grads, wanted, given, allow_unused=True)) if grads else iter([None] * len(wanted))
    return tuple(next(found) if v.requires_grad else None for v in seeds)


def scaled_backward(node, slots, scaled):
    """Gradients of a jointly linear node's parameter operands from its scaled output cotangent."""
    with torch.no_grad():
        returned = as_tuple(node(scaled.to(node._input_metadata[0].dtype)))
    return {k: reduce_to(returned[k], node, k) for k in slots if returned[k] is not None}


class Rule:
    """A linear or piecewise linear operation without products. ``fresh``: the tangent it returns shares no memory with
    the one it was given. ``saves``: activations which its node holds and which nothing needs after the tangent."""

    fresh = False
    hands_on = False  # the tangent may be a plain alias of the one given: whoever owned that owns this
    saves = ()
    needs_shape_of = None  # saved tensor of which only the shape is used
    masked_by_output = None  # saved tensor that the operation's output could stand in for

    def __init__(self, op):
        self.op = op

    def refuse(self, node, x_slots, p_slots):
        if p_slots and self.op not in JOINT:
            return f"{node.name()} takes a parameter in a way that is not known to be linear"
        return None

    def mixes_rows(self, x_slots):
        return False

    def operand(self, node, ins):
        """The saved input-dependent operand of a product with a parameter."""
        raise LookupError(self.op)

    def has_product(self, ins):
        """True if a parameter multiplies the input-dependent operand."""
        return False

    def tangent(self, node, ins, tangents, reuse):
        return transpose_twice(node, ins.x_slots, tangents)

    def weight_gradients(self, node, ins, d, u):
        return {}

    def slope(self, node):
        """Of an operation that is 1 or this, by the sign of its output: that slope. None for all others."""
        return None

    def bias_gradients(self, node, ins, d, factor):
        return scaled_backward(node, ins.p_slots, d * factor)


class Identity(Rule):
    """Clone, dtype conversion, alias."""

    hands_on = True

    def tangent(self, node, ins, tangents, reuse):
        return (tangents[0].to(node._input_metadata[0].dtype),)


class Reshape(Rule):
    hands_on = True

    def tangent(self, node, ins, tangents, reuse):
        return (tangents[0].reshape(tuple(node._input_metadata[0].shape)),)


class Expand(Rule):
    def tangent(self, node, ins, tangents, reuse):
        return (tangents[0].expand(tuple(node._input_metadata[0].shape)),)


class Sum(Rule):
    fresh = True

    def __init__(self, op, function):
        super().__init__(op)
        self.function = function

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        dims = getattr(node, "_saved_dim", None)
        if dims is None:
            return (self.function(t),)
        # autograd stores negative dimensions as unsigned 64-bit numbers
        dims = [d - (1 << 64) if d >= 1 << 63 else d for d in ([dims] if isinstance(dims, int) else dims)]
        return (self.function(t, dims, node._saved_keepdim) if dims else self.function(t).view(_out_shape(node)),)


def _out_shape(node):
    return tuple(node._input_metadata[0].shape)


class LeakyRelu(Rule):
    fresh = True
    saves = ("self", "result")  # the in-place form keeps its result
    masked_by_output = "self"

    def slope(self, node):
        return node._saved_negative_slope if node._saved_negative_slope >= 0 else None

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        mask = node._saved_self if hasattr(node, "_raw_saved_self") else node._saved_result
        slope = node._saved_negative_slope
        if reuse[0]:
            return (aten.leaky_relu_backward.grad_input(t, mask, slope, False, grad_input=t),)
        return (aten.leaky_relu_backward(t, mask, slope, False),)


class Relu(Rule):
    fresh = True
    saves = ("result",)

    def slope(self, node):
        return 0.0

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        if reuse[0]:
            return (aten.threshold_backward.grad_input(t, node._saved_result, 0, grad_input=t),)
        return (aten.threshold_backward(t, node._saved_result, 0),)


class Elementwise(Rule):
    """y_i = f(x_i): the linear map is diagonal, so the node's backward is its own transpose."""

    fresh = True
    saves = ("self",)

    def tangent(self, node, ins, tangents, reuse):
        return (node(tangents[0]),)


class MaxPool(Rule):
    fresh = True
    saves = ("self", "result1")
    needs_shape_of = "self"

    def __init__(self, op, spatial):
        super().__init__(op)
        self.spatial = spatial

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        where = node._saved_result1
        return (t.flatten(-self.spatial).gather(-1, where.flatten(-self.spatial)).view(where.shape),)


class AvgPool2d(Rule):
    fresh = True
    needs_shape_of = "self"

    def tangent(self, node, ins, tangents, reuse):
        return (
            aten.avg_pool2d(
                tangents[0],
                node._saved_kernel_size,
                node._saved_stride,
                node._saved_padding,
                node._saved_ceil_mode,
                node._saved_count_include_pad,
                node._saved_divisor_override,
            ),
        )


class Cat(Rule):
    fresh = True

    def tangent(self, node, ins, tangents, reuse):
        if len(ins.x_slots) < len(node.next_functions) or any(t is None for t in tangents):
            return transpose_twice(node, ins.x_slots, tangents)
        dim = node._saved_dim
        return (torch.cat(tangents, dim - (1 << 64) if dim >= 1 << 63 else dim),)


class AddSub(Rule):
    """self + alpha * other, or minus."""

    hands_on = True

    def __init__(self, op, sign):
        super().__init__(op)
        self.sign = sign

    def tangent(self, node, ins, tangents, reuse):
        alpha = self.sign * node._saved_alpha
        parts = [(t, 1 if slot == 0 else alpha) for slot, t in zip(ins.x_slots, tangents, strict=False) if t is not None]
        shape = _out_shape(node)
        if len(parts) == 1:
            t, k = parts[0]
            t = t if k == 1 else t * k
            return (t if t.shape == shape else t.expand(shape).clone(),)
        (a, _), (b, k) = parts
        if reuse[0] and a.shape == shape and a.dtype == torch.result_type(a, b):
            return (a.add_(b, alpha=k),)
        return (torch.add(a, b, alpha=k),)

    def bias_gradients(self, node, ins, d, factor):
        scaled = d * factor
        return {k: reduce_to(scaled if k == 0 else scaled * (self.sign * node._saved_alpha), node, k) for k in ins.p_slots}


class Product(Rule):
    """Bilinear operations: one operand depends on the input, another on parameters or on neither."""

    fresh = True
    operands = (0, 1)
    names = ("self", "other")
    added = None  # position of an added operand

    def refuse(self, node, x_slots, p_slots):
        if all(k in x_slots for k in self.operands):
            return f"{node.name()} multiplies two tensors that both depend on the input"
        if not any(k in x_slots for k in self.operands) or self.added in x_slots:
            return f"{node.name()} adds a product to something that depends on the input"
        return None

    def operand_slot(self, ins):
        return next(k for k in ins.x_slots if k in self.operands)

    def other_slot(self, ins):
        first, second = self.operands
        return second if self.operand_slot(ins) == first else first

    def has_product(self, ins):
        return self.other_slot(ins) in ins.p_slots

    def saved_name(self, slot):
        return "_saved_" + self.names[self.operands.index(slot)]

    def operand(self, node, ins):
        return getattr(node, self.saved_name(self.operand_slot(ins)))

    def other(self, node, ins):
        return getattr(node, self.saved_name(self.other_slot(ins)))

    def bias_gradients(self, node, ins, d, factor):
        return {}


class Convolution(Product):
    names = ("input", "weight")
    saves = ("input",)
    added = 2

    def refuse(self, node, x_slots, p_slots):
        return f"{node.name()}: the filter depends on the input" if x_slots != (0,) else None

    def _settings(self, node):
        return (
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_transposed,
            node._saved_output_padding,
            node._saved_groups,
        )

    def tangent(self, node, ins, tangents, reuse):
        return (torch.convolution(tangents[0], node._saved_weight, None, *self._settings(node)),)

    def reads_few_channels(self, node):
        """A first layer on images: oneDNN, made for blocks of channels, takes two to three times as long for the gradient of
        three as a product and a sum over windows do."""
        weight, (_, _, _, transposed, _, groups) = node._saved_weight, self._settings(node)
        plain = not transposed and groups == 1 and weight.dtype in (torch.float32, torch.float64)
        same = node._input_metadata[0].dtype == weight.dtype
        return plain and same and weight.dim() == 4 and weight.shape[1] <= FEW_CHANNELS and weight.device.type == "cpu"

    def input_gradient(self, node, d):
        """The input's cotangent from the output's, where :meth:`reads_few_channels`."""
        # one number where it is the same for both: padding="valid" saves it like this
        stride, padding, dilation = (tuple(v) * 2 if len(v) == 1 else v for v in self._settings(node)[:3])
        kernel, size = node._saved_weight.shape[2:], edge_metadata(node, 0).shape[2:]
        full = [(d.shape[k + 2] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (kernel[k] - 1) + 1 for k in (0, 1)]
        rest = [size[k] - full[k] for k in (0, 1)]  # rows and columns that no window reaches
        return aten.slow_conv_transpose2d(d, node._saved_weight, kernel, None, stride, padding, rest, dilation)

    def weight_gradients(self, node, ins, d, u):
        mask = [False, True, False]
        return {
            1: aten.convolution_backward(d, u, node._saved_weight, None, *self._settings(node), mask)[1],
        }

    def bias_gradients(self, node, ins, d, factor):
        if 2 not in ins.p_slots:
            return {}
        if isinstance(factor, torch.Tensor) and factor.shape[0] == d.shape[0] == factor.numel():
            # one factor per row: sum the pixels first, then one small matrix-vector product
            return {2: factor.reshape(-1).to(d.dtype) @ d.flatten(2).sum(2) if d.dim() > 2 else factor.view(-1) @ d}
        keep = [k for k in range(d.dim()) if k != 1]
        if not isinstance(factor, torch.Tensor):
            return {2: d.sum(keep) * factor}
        return {2: (d * factor).sum(keep)}


class MatMul(Product):
    """mm, addmm, bmm, baddbmm: alpha * (first @ second) [+ beta * added]."""

    saves = ("self", "mat1", "batch1", "mat2", "batch2")

    def __init__(self, op, operands, names, added=None):
        super().__init__(op)
        self.operands, self.names, self.added = operands, names, added

    def mixes_rows(self, x_slots):
        return self.operands[1] in x_slots

    def multiply_adds(self, node, ins):
        rows, columns = node._input_metadata[0].shape[-2:]
        return self.other(node, ins).numel() * (rows if self.operand_slot(ins) == self.operands[0] else columns)

    def _alpha(self, node):
        return getattr(node, "_saved_alpha", 1)

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        other = self.other(node, ins)
        t = t @ other if self.operand_slot(ins) == self.operands[0] else other @ t
        alpha = self._alpha(node)
        return (t if alpha == 1 else t * alpha,)

    def weight_gradients(self, node, ins, d, u):
        slot = self.other_slot(ins)
        if self.operand_slot(ins) != self.operands[0]:
            g = d @ u.mT
        elif node.next_functions[slot][0].name() == "TBackward0":
            g = (d.mT @ u).mT  # a linear layer's weight: contiguous once transposed back
        else:
            g = u.mT @ d
        alpha = self._alpha(node)
        return {slot: g if alpha == 1 else g * alpha}

    def bias_gradients(self, node, ins, d, factor):
        if self.added not in ins.p_slots:
            return {}
        beta = getattr(node, "_saved_beta", 1)
        rows = isinstance(factor, torch.Tensor) and d.dim() == 2 and factor.shape[0] == d.shape[0] == factor.numel()
        g = (factor.view(1, -1) @ d).view(-1) if rows else d * factor
        if rows and tuple(edge_metadata(node, self.added).shape) != g.shape:
            g = d * factor
        g = reduce_to(g, node, self.added)
        return {self.added: g if beta == 1 else g * beta}


class MatVec(Product):
    names = ("self", "vec")
    saves = ("self", "vec")

    def mixes_rows(self, x_slots):
        return 1 in x_slots

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        other = self.other(node, ins)
        return (t.mv(other) if self.operand_slot(ins) == 0 else other.mv(t),)

    def weight_gradients(self, node, ins, d, u):
        return {1: u.mT.mv(d)} if self.operand_slot(ins) == 0 else {0: torch.outer(d, u)}


class Mul(Product):
    saves = ("self", "other")

    def tangent(self, node, ins, tangents, reuse):
        return ((tangents[0] * self.other(node, ins)).to(node._input_metadata[0].dtype),)

    def weight_gradients(self, node, ins, d, u):
        slot = self.other_slot(ins)
        return {slot: reduce_to(d * u, node, slot)}


class Div(Product):
    saves = ("self",)

    def refuse(self, node, x_slots, p_slots):
        if 1 in x_slots:
            return f"{node.name()} divides by a tensor that depends on the input"
        if getattr(node, "_saved_rounding_mode", None) is not None:
            return f"{node.name()} rounds"
        return None

    def tangent(self, node, ins, tangents, reuse):
        return (tangents[0] / node._saved_other,)

    def weight_gradients(self, node, ins, d, u):
        q = node._saved_other
        return {1: reduce_to(-d * u / (q * q), node, 1)}


class Prelu(Product):
    names = ("self", "weight")
    saves = ("self",)

    def refuse(self, node, x_slots, p_slots):
        return f"{node.name()}: the slope depends on the input" if x_slots != (0,) else None

    def tangent(self, node, ins, tangents, reuse):
        (t,) = tangents
        return (torch.where(node._saved_self > 0, t, t * node._saved_weight),)

    def weight_gradients(self, node, ins, d, u):
        return {1: reduce_to(torch.where(node._saved_self > 0, 0, d * u), node, 1)}


class BatchNormEval(Product):
    """Batch normalisation with its running statistics: (x - mean) * r * weight + bias."""

    saves = ("input",)

    def refuse(self, node, x_slots, p_slots):
        if node._saved_training:
            return f"{node.name()} normalises with the statistics of the batch"
        return f"{node.name()}: weights depend on the input" if x_slots != (0,) else None

    def operand(self, node, ins):
        return node._saved_input - self._channels(node._saved_running_mean, node)

    def _channels(self, v, node):
        return v.view([1, -1] + [1] * (len(_out_shape(node)) - 2))

    def _r(self, node):
        eps = (
            node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
        )  # cuDNN's and MIOpen's nodes say the latter
        return (node._saved_running_var + eps).rsqrt()

    def tangent(self, node, ins, tangents, reuse):
        r = self._r(node)
        if node._saved_weight is not None:
            r = r * node._saved_weight
        return (tangents[0] * self._channels(r, node),)

    def weight_gradients(self, node, ins, d, u):
        keep = [k for k in range(d.dim()) if k != 1]
        return {1: (d * u).sum(keep) * self._r(node)}

    def bias_gradients(self, node, ins, d, factor):
        return {2: (d * factor).sum([k for k in range(d.dim()) if k != 1])} if 2 in ins.p_slots else {}


class GridSampler(Rule):
    def refuse(self, node, x_slots, p_slots):
        return None if x_slots == (0,) and not p_slots else f"{node.name()}: the grid is not a constant"


_RULES = {op: Rule(op) for op in LINEAR | PIECEWISE}
_RULES.update({op: Identity(op) for op in ("Clone", "ToCopy", "Alias")})
_RULES.update({op: Reshape(op) for op in ("View", "UnsafeView", "ReshapeAlias", "Reshape", "Squeeze", "Unsqueeze")})
_RULES.update(
    {
        "Expand": Expand("Expand"),
        "Sum": Sum("Sum", torch.sum),
        "Mean": Sum("Mean", torch.mean),
        "Hardsigmoid": Elementwise("Hardsigmoid"),  # whose backward has no derivative in PyTorch
        "LeakyRelu": LeakyRelu("LeakyRelu"),
        "Relu": Relu("Relu"),
        "MaxPool2DWithIndices": MaxPool("MaxPool2DWithIndices", 2),
        "MaxPool3DWithIndices": MaxPool("MaxPool3DWithIndices", 3),
        "AvgPool2D": AvgPool2d("AvgPool2D"),
        "Cat": Cat("Cat"),
        "Add": AddSub("Add", 1),
        "Sub": AddSub("Sub", -1),
        "Convolution": Convolution("Convolution"),
        "Mm": MatMul("Mm", (0, 1), ("self", "mat2")),
        "Bmm": MatMul("Bmm", (0, 1), ("self", "mat2")),
        "Addmm": MatMul("Addmm", (1, 2), ("mat1", "mat2"), added=0),
        "Baddbmm": MatMul("Baddbmm", (1, 2), ("batch1", "batch2"), added=0),
        "Mv": MatVec("Mv"),
        "Mul": Mul("Mul"),
        "Div": Div("Div"),
        "PreluKernel": Prelu("PreluKernel"),
        **{op: BatchNormEval(op) for op in ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")},
        "GridSampler2D": GridSampler("GridSampler2D"),
        "GridSampler3D": GridSampler("GridSampler3D"),
    }
)


def rule_for(op):
    """The rule of an operation, or None if nothing is known about it."""
    return _RULES.get(op)
