"""The specification: one file per operator with its schema, plain-torch reference, fake and derivatives."""

from fastgan.ops import gradient_penalty as gradient_penalty
from fastgan.ops import minibatch_discrimination as minibatch_discrimination
from fastgan.ops import minibatch_stddev as minibatch_stddev
from fastgan.ops import pairwise_kernel_sum as pairwise_kernel_sum
from fastgan.ops import spectral_norm as spectral_norm
from fastgan.ops import tangent_combine as tangent_combine
from fastgan.ops._declare import executed as executed
from fastgan.ops._declare import references as references
