"""Which dtypes fastgan computes with, and in which it adds up."""

import torch

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in float32: a float16 sum of squares overflows at norm 256, bfloat16 stops counting there."""
    return torch.float32 if dtype in HALF else dtype
