"""The layers of fastgan."""

from fastgan.nn.minibatch_discrimination import MinibatchDiscrimination as MinibatchDiscrimination
