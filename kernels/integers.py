"""Arithmetic on counts that both kinds of kernels need."""

import numpy as np


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """How many come before each, and in all: (T + 1,) int64 from (T,)."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
