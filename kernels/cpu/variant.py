"""What a kernel is compiled for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from .simd import simd
from .tiling import Block
from .vector import SIZE


class Variant(NamedTuple):
    """Dtypes, by NumPy's names, and the shape of register blocks."""

    scalar: str  # computed in
    storage: str  # of the tensors
    block: Block
    fast_reciprocal: bool  # AVX-512's estimate in place of a division

    @property
    def key(self) -> str:
        """What tells the compiled code of this variant from that of others."""
        block = self.block
        fast = "_fast" if self.fast_reciprocal else ""
        return f"{self.scalar}_{self.storage}_{block.lanes}x{block.rows}of{block.registers}{fast}"

    @property
    def ops(self) -> SimpleNamespace:
        """The operations on vectors; see ``simd``."""
        return simd(self.scalar, self.block.lanes, self.fast_reciprocal)

    @property
    def size(self) -> int:
        """Bytes of a value that is computed with."""
        return SIZE[self.scalar]

    @property
    def stored(self) -> int:
        """Bytes of a value of a tensor."""
        return SIZE[self.storage]

    @property
    def vector_bytes(self) -> int:
        return self.block.lanes * self.size

    @property
    def gate_bytes(self) -> int:
        """Of one row in one panel: four vectors, one a gate."""
        return 4 * self.vector_bytes
