"""Minibatch discrimination as a layer, in the conventions of torchgan and of improved-gan."""

import torch
from torch import Tensor, nn

from fastgan.functional import minibatch_discrimination


class MinibatchDiscrimination(nn.Module):
    r"""Append to each sample's features how close it is to the rest of the minibatch.

    ``m = x @ T`` with ``T`` of shape (in_features, out_features, kernel_dims), then
    :math:`o_{ik} = \sum_{j \ne i} \exp(-\lVert m_{ik} - m_{jk} \rVert_1)`; returns ``cat([x, o], 1)``.

    Args:
        in_features: A, length of a sample's feature vector.
        out_features: K, number of kernels, i.e. of features appended.
        kernel_dims: D, dimensions of a kernel.
        self_term: count the sample itself, which adds 1 to each feature (the paper's sum). Default: not, as in
            torchgan and improved-gan.
        weight_norm: project with ``T * exp(log_weight_scale) / ||T||``, norm over ``in_features`` (improved-gan).
        bias: add a learnt bias to the K features, initially -1 (improved-gan).
        init_std: standard deviation of T's normal initialisation. Default: 0.05 with ``weight_norm``, else 1 (torchgan).
        concat: return ``cat([x, o], 1)``, else ``o`` alone.
        group: process group or ``"world"`` for a minibatch that spans ranks, see :func:`fastgan.minibatch_discrimination`.

    Shapes: x (B, in_features) -> (B, in_features + out_features), or (B, out_features) without ``concat``.

    state_dict: ``T`` (the key and shape of torchgan's ``MinibatchDiscrimination1d``); with the options also
    ``log_weight_scale`` (K, D) and ``bias`` (K,).

    Raises:
        ValueError: a size that is not positive; x with another shape than (B, in_features).

    Source: Salimans et al. 2016, section 3.2; the options are those of its released code.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_dims: int = 16,
        *,
        self_term: bool = False,
        weight_norm: bool = False,
        bias: bool = False,
        init_std: float | None = None,
        concat: bool = True,
        group=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("kernel_dims", kernel_dims)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"MinibatchDiscrimination: {name} is {size!r}, expected a positive integer")
        self.in_features, self.out_features, self.kernel_dims = in_features, out_features, kernel_dims
        self.self_term, self.concat, self.group = self_term, concat, group
        self.init_std = (0.05 if weight_norm else 1.0) if init_std is None else init_std
        make = {"device": device, "dtype": dtype}
        self.T = nn.Parameter(torch.empty(in_features, out_features, kernel_dims, **make))
        self.register_parameter(
            "log_weight_scale", nn.Parameter(torch.empty(out_features, kernel_dims, **make)) if weight_norm else None
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **make)) if bias else None)
        self.reset_parameters()

    @classmethod
    def improved_gan(cls, in_features: int, num_kernels: int, dim_per_kernel: int = 5, **options) -> "MinibatchDiscrimination":
        """The layer of the paper's released code: weight normalisation and bias; see also ``init_from_data``."""
        return cls(in_features, num_kernels, dim_per_kernel, weight_norm=True, bias=True, **options)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.T, 0.0, self.init_std)
        if self.log_weight_scale is not None:
            nn.init.zeros_(self.log_weight_scale)
        if self.bias is not None:
            nn.init.constant_(self.bias, -1.0)

    def project(self, x: Tensor) -> Tensor:
        """x (B, in_features) -> m (B, out_features, kernel_dims)."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"MinibatchDiscrimination: x has shape {tuple(x.shape)}, expected (B, {self.in_features}); "
                f"flatten feature maps with x.flatten(1) and make in_features match"
            )
        weight = self.T
        if self.log_weight_scale is not None:
            weight = weight * (self.log_weight_scale.exp() / weight.square().sum(0).sqrt())
        return (x @ weight.flatten(1)).unflatten(1, (self.out_features, self.kernel_dims))

    def forward(self, x: Tensor) -> Tensor:
        features = minibatch_discrimination(self.project(x), self_term=self.self_term, group=self.group)
        if self.bias is not None:
            features = features + self.bias
        return torch.cat([x, features], 1) if self.concat else features

    @torch.no_grad()
    def init_from_data(self, x: Tensor) -> None:
        """improved-gan's data-dependent start, on one batch x (B, in_features), B >= 2.

        Looks at this batch alone, also with ``group``: call it before parameters are shared between ranks.
        Scales each kernel so that the mean distance to the nearest other sample is 2, then sets the bias so that its
        features average 0 on this batch.

        Raises:
            RuntimeError: the layer has no ``log_weight_scale`` and ``bias``, or all samples coincide for some kernel;
                parameters are untouched then.
        """
        if self.log_weight_scale is None or self.bias is None:
            raise RuntimeError(
                "MinibatchDiscrimination.init_from_data: needs weight_norm=True and bias=True (or .improved_gan)"
            )
        m = self.project(x)
        if m.shape[0] < 2:
            raise RuntimeError(f"MinibatchDiscrimination.init_from_data: x has {m.shape[0]} samples, expected at least 2")
        nearest = m.new_full(m.shape[:2], torch.inf)
        for i in range(m.shape[0]):  # a row at a time: memory stays O(B K D)
            distance = (m[i] - m).abs().sum(-1)
            distance[i] = torch.inf
            nearest[i] = distance.amin(0)
        half = 0.5 * nearest.mean(0)
        if not bool((half > 0).all() & half.isfinite().all()):
            raise RuntimeError(
                "MinibatchDiscrimination.init_from_data: the nearest-sample distance is zero or not finite for some kernel; "
                "use a batch of distinct, finite samples"
            )
        features = minibatch_discrimination(m / half[:, None], self_term=self.self_term)
        self.log_weight_scale -= half.log()[:, None]
        self.bias.copy_(-features.mean(0))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, kernel_dims={self.kernel_dims}"
        text += f", self_term={self.self_term}, weight_norm={self.log_weight_scale is not None}, bias={self.bias is not None}"
        return text if self.concat else text + ", concat=False"
