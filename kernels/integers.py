"""Arithmetic on counts, for the CPU and the GPU kernels."""

import numpy as np


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """Running totals (T + 1,) int64 of (T,): what comes before each, and the total."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
