"""fastgan: fused kernels for GAN training in PyTorch.

``import fastgan`` needs torch alone. ``python -m fastgan doctor`` tells which kernels serve on this machine, and why.
"""

from fastgan import backends as backends
from fastgan import functional as functional
from fastgan import nn as nn
from fastgan import ops as ops
from fastgan._version import __version__ as __version__
from fastgan.backends import use_backend as use_backend
from fastgan.functional import minibatch_discrimination as minibatch_discrimination
from fastgan.nn.spectral_norm_group import SpectralNormGroup as SpectralNormGroup
from fastgan.nn.spectral_norm_state import convert_spectral_state_dict as convert_spectral_state_dict
from fastgan.nn.utils.parametrizations import spectral_norm as spectral_norm
