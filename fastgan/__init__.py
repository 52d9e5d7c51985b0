"""fastgan: fused kernels for GAN training in PyTorch.

``import fastgan`` needs torch alone. ``python -m fastgan doctor`` tells which kernels serve on this machine, and why.
"""

from fastgan import backends as backends
from fastgan import compat as compat
from fastgan import functional as functional
from fastgan import losses as losses
from fastgan import nn as nn
from fastgan import ops as ops
from fastgan import penalties as penalties
from fastgan._version import __version__ as __version__
from fastgan.backends import use_backend as use_backend
from fastgan.critic import CriticStep as CriticStep
from fastgan.critic import GraphedCriticStep as GraphedCriticStep
from fastgan.dropin import accelerate as accelerate
from fastgan.dropin import audit as audit
from fastgan.dropin import restore as restore
from fastgan.functional import critic_step as critic_step
from fastgan.functional import dragan_penalty as dragan_penalty
from fastgan.functional import energy_distance as energy_distance
from fastgan.functional import explain as explain
from fastgan.functional import feature_matching as feature_matching
from fastgan.functional import gradient_penalty as gradient_penalty
from fastgan.functional import max_gradient_penalty as max_gradient_penalty
from fastgan.functional import minibatch_discrimination as minibatch_discrimination
from fastgan.functional import minibatch_stddev as minibatch_stddev
from fastgan.functional import mmd as mmd
from fastgan.functional import nearest_distances as nearest_distances
from fastgan.functional import pairwise_kernel_sum as pairwise_kernel_sum
from fastgan.functional import path_length_penalty as path_length_penalty
from fastgan.functional import penalty_from_output as penalty_from_output
from fastgan.functional import pulling_away as pulling_away
from fastgan.functional import r1_penalty as r1_penalty
from fastgan.functional import r2_penalty as r2_penalty
from fastgan.functional import wgan_div_penalty as wgan_div_penalty
from fastgan.functional import zero_centered_penalty as zero_centered_penalty
from fastgan.nn.spectral_norm_group import SpectralNormGroup as SpectralNormGroup
from fastgan.nn.spectral_norm_state import convert_spectral_state_dict as convert_spectral_state_dict
from fastgan.nn.utils.parametrizations import spectral_norm as spectral_norm
from fastgan.profiler import profile as profile
from fastgan.profiler import profile_batches as profile_batches
