"""Forward mode that can be differentiated afterwards.

The forward-mode formulas of PyTorch's fused normalisations treat their saved statistics as constants, so that the
gradient of a tangent through them is silently wrong; fused attention has none that keeps its graph. Inside
:class:`Composed` these functions are written out in elementary operations.
"""

import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Nodes whose presence in a graph with tangents means that a formula above was bypassed.
WRONG_TANGENTS = frozenset(
    ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm", "NativeGroupNorm")
)


def _normalised(x, dims, eps):
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x, weight, bias):
    shape = [1, -1] + [1] * (x.dim() - 2)
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    x = _normalised(input, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        x = _normalised(input, [0, *range(2, input.dim())], eps)
    else:
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = (input - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
    return _affine(x, weight, bias)


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_normalised(input, list(range(2, input.dim())), eps), weight, bias)


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    x = _normalised(input.reshape(input.shape[0], num_groups, -1), [2], eps).view(input.shape)
    return _affine(x, weight, bias)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        raise RuntimeError(
            'forward mode does not cover attention with enable_gqa: use method="finite_difference", or the math kernel'
        )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = softmax(scores, -1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def softmax(input, dim=None, *rest, dtype=None, **_):
    # rest: F.softmax's private _stacklevel, then dtype; a dtype may stand second for torch.softmax
    dtype = next((r for r in rest if isinstance(r, torch.dtype)), dtype)
    input = input if dtype is None else input.to(dtype)
    powers = (input - input.detach().amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


_COMPOSED = {
    torch.softmax: softmax,
    torch.Tensor.softmax: softmax,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.scaled_dot_product_attention: attention,
}


class Composed(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))
