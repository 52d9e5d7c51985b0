"""Minibatch standard deviation as a layer, in the conventions of StyleGAN, pytorch_GAN_zoo and progressive GANs."""

from torch import Tensor, nn

from fastgan.functional import check_stddev_options, minibatch_stddev


class MinibatchStdDev(nn.Module):
    r"""Append ``num_channels`` channels with the standard deviation over groups of samples: StyleGAN's ``MinibatchStdLayer``.

    ``MinibatchStdDev(4)`` is StyleGAN2's and 3's, ``MinibatchStdDev(4, layout="contiguous", unbiased=True, remainder="whole")``
    pytorch_GAN_zoo's, ``MinibatchStdDev(None)`` that of progressive GANs.

    Args: those of :func:`fastgan.minibatch_stddev`, kept as attributes of the same names.

    Shapes: x (B, C, ...) -> (B, C + num_channels, ...).

    No parameters, no buffers, nothing in the state_dict, so that checkpoints of either layer load.

    Raises:
        ValueError: an option other than :func:`fastgan.minibatch_stddev` takes.

    Source: Karras et al. 2017, section 3, and Karras et al. 2020.
    """

    def __init__(
        self,
        group_size: int | None = 4,
        num_channels: int = 1,
        *,
        layout: str = "strided",
        unbiased: bool = False,
        remainder: str = "even",
        eps: float = 1e-8,
        group=None,
    ):
        super().__init__()
        check_stddev_options("MinibatchStdDev", group_size, num_channels, layout, remainder, eps)
        self.group_size, self.num_channels, self.layout = group_size, num_channels, layout
        self.unbiased, self.remainder, self.eps, self.group = unbiased, remainder, eps, group

    def forward(self, x: Tensor) -> Tensor:
        return minibatch_stddev(
            x,
            group_size=self.group_size,
            num_channels=self.num_channels,
            layout=self.layout,
            unbiased=self.unbiased,
            remainder=self.remainder,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, num_channels={self.num_channels}, layout={self.layout!r}, "
            f"unbiased={self.unbiased}, remainder={self.remainder!r}, eps={self.eps}"
        )
