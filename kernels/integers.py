"""Arithmetic on counts that both kinds of kernels need."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
