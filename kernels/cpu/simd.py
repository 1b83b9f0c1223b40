"""All operations of the kernels on one vector type."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from .activations import activations
from .memory import adjacent_vectors, pairs, partial_vectors, tiles, whole_vectors
from .vector import SIZE, Vector


@functools.cache
def simd(scalar: str, lanes: int, fast_reciprocal: bool = False) -> SimpleNamespace:
    """The operations on vectors of ``lanes`` x ``scalar``; ``fast_reciprocal`` needs AVX-512 and whole
    registers of it.

    They are Numba intrinsics that emit LLVM's own vector instructions, and functions of these.
    """
    vector = Vector(scalar, lanes)
    return SimpleNamespace(
        vector=vector, lanes=lanes, size=SIZE[scalar],
        **whole_vectors(vector), **partial_vectors(vector), **adjacent_vectors(vector), **tiles(vector),
        **pairs(vector),
        **activations(vector, fast_reciprocal),
    )  # fmt: skip
