"""fastgan: fused kernels for GAN training in PyTorch. See README.md; ``python -m fastgan doctor`` tells what serves here."""

from fastgan._version import __version__ as __version__
from fastgan.backends import use_backend as use_backend
