"""Compile-time parameters of a kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from .simd import simd
from .tiling import Block
from .vector import SIZE


class Variant(NamedTuple):
    """Dtypes, by NumPy's names, and the shape of register blocks."""

    scalar: str  # dtype of the computation
    storage: str  # dtype of the caller's tensors
    block: Block
    fast_reciprocal: bool  # AVX-512's estimate instead of a division

    @property
    def key(self) -> str:
        """A name that is different for each variant."""
        block = self.block
        fast = "_fast" if self.fast_reciprocal else ""
        return f"{self.scalar}_{self.storage}_{block.lanes}x{block.rows}of{block.registers}{fast}"

    @property
    def ops(self) -> SimpleNamespace:
        """The operations on vectors; see ``simd``."""
        return simd(self.scalar, self.block.lanes, self.fast_reciprocal)

    @property
    def size(self) -> int:
        """Bytes of a value of ``scalar``."""
        return SIZE[self.scalar]

    @property
    def stored(self) -> int:
        """Bytes of a value of ``storage``."""
        return SIZE[self.storage]

    @property
    def vector_bytes(self) -> int:
        return self.block.lanes * self.size

    @property
    def gate_bytes(self) -> int:
        """Bytes of one row of one panel: four vectors, one per gate."""
        return 4 * self.vector_bytes
