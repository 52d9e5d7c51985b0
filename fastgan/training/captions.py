"""Short texts about images, from the names of their classes: "seven", "a small seven", "a large seven"."""

import torch
from torch import Tensor
from torch.nn import functional

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = ("small", "large")
SHRINK = 0.6  # of a small one
LENGTH = 2  # tokens


class Captions:
    """A vocabulary: nothing (token 0), the sizes, and a noun for each class; a digit's is its name in words."""

    def __init__(self, class_names: tuple[str, ...]):
        self.nouns = [NUMBERS[int(name)] if name in tuple("0123456789") else name for name in class_names]
        self.words = ["", *SIZES, *self.nouns]

    def tokens(self, text: str) -> Tensor:
        """(2,) int64: size or 0, noun. ValueError names a word that isn't known."""
        words = text.split()
        if len(words) > 1 and words[0].lower() in ("a", "an", "the"):
            words = words[1:]
        size, noun = (words[0].lower(), " ".join(words[1:])) if words and words[0].lower() in SIZES else ("", " ".join(words))
        noun = noun if noun in self.nouns else noun.lower()
        if noun not in self.nouns:
            raise ValueError(f"text {text!r}: expected [a] [{'|'.join(SIZES)}] and one of {', '.join(self.nouns)}")
        return torch.tensor([self.words.index(size), self.words.index(noun, 1 + len(SIZES))])

    def of(self, label: Tensor, size: Tensor) -> Tensor:
        """(B, 2) tokens of labels (B,) and sizes (B,): 0 not mentioned, 1 small, 2 large."""
        return torch.stack([size, 1 + len(SIZES) + label], 1)

    def text(self, tokens: Tensor) -> str:
        return " ".join(self.words[int(token)] for token in tokens if token)


def shrunk(images: Tensor, small: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], those with ``small`` (B,) made smaller in the middle of black."""
    side = round(images.shape[-1] * SHRINK)
    before = (images.shape[-1] - side) // 2
    after = images.shape[-1] - side - before
    little = functional.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
    little = functional.pad(little, (before, after, before, after), value=-1.0)
    return torch.where(small[:, None, None, None], little, images)
