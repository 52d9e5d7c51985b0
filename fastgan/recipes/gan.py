"""The first GAN: two networks play against each other, binary cross entropy on the critic's scores.

``--set loss=minimax`` is the game as it is first written, where the generator's gradient vanishes once the critic wins;
the default is the paper's own remedy. Perceptrons for points, convolutions with batch norm for images.

Goodfellow et al., "Generative adversarial nets", 2014.
"""

from fastgan.training.recipe import GAN


class Recipe(GAN):
    data = "ring"
    batch_size = 256
    steps = 3000
