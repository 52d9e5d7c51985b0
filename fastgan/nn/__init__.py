"""The layers of fastgan."""

from fastgan.nn import utils as utils
from fastgan.nn.minibatch_discrimination import MinibatchDiscrimination as MinibatchDiscrimination
from fastgan.nn.minibatch_stddev import MinibatchStdDev as MinibatchStdDev
