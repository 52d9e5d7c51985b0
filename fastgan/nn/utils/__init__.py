"""Drop-ins for ``torch.nn.utils``: the same names, signatures, keys and numbers, on fastgan's kernels."""

from fastgan.nn.utils import parametrizations as parametrizations
from fastgan.nn.utils.spectral_norm import remove_spectral_norm as remove_spectral_norm
from fastgan.nn.utils.spectral_norm import spectral_norm as spectral_norm
