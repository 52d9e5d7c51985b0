"""The layers of fastgan."""

from fastgan.nn import utils as utils
from fastgan.nn.minibatch_discrimination import MinibatchDiscrimination as MinibatchDiscrimination
