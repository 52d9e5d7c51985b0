"""Triton kernels, one file per operator: the same stem as in fastgan/ops and csrc."""
