"""Compile-time parameters of a kernel."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

from .jit import inline
from .products import Products
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
        products = f"_{self.products.instruction}" + "_emulated" * self.products.emulated
        return f"{self.scalar}_{self.storage}_{block.lanes}x{block.rows}of{block.registers}{fast}{products}"

    @property
    def ops(self) -> SimpleNamespace:
        """The operations on vectors; see ``simd``."""
        return simd(self.scalar, self.block.lanes, self.fast_reciprocal)

    @property
    def size(self) -> int:
        """Bytes of a value of ``scalar``, and of a term of a product."""
        return SIZE[self.scalar]

    @property
    def products(self) -> Products:
        return self.block.products

    @property
    def operand(self) -> str:
        """The dtype of what products read."""
        return "bfloat16" if self.products.paired else self.scalar

    @property
    def operand_size(self) -> int:
        """Bytes of a value of ``operand``."""
        return SIZE[self.operand]

    @property
    def operand_lanes(self) -> int:
        """Values that rows of operands are padded to: whole vectors, and whole groups of terms."""
        return max(self.block.lanes, self.products.values * self.products.group)

    def operand_row(self, values: int) -> int:
        """Bytes of a row of operands."""
        return -(-values // self.operand_lanes) * self.operand_lanes * self.operand_size

    @property
    def stored(self) -> int:
        """Bytes of a value of ``storage``."""
        return SIZE[self.storage]

    @property
    def vector_bytes(self) -> int:
        return self.block.lanes * self.size

    @property
    def gate_bytes(self) -> int:
        """Bytes of one row of one panel, and of one of its terms: four vectors, one per gate."""
        return 4 * self.vector_bytes


@functools.cache
def row_sizes(variant: Variant) -> tuple[Any, Any]:
    """For kernels: (``terms(values)``, ``operand_row(values)``), as ``Products.terms`` and ``Variant.operand_row``."""
    group, whole = variant.products.group, variant.products.values * variant.products.group
    lanes, size = variant.operand_lanes, variant.operand_size

    @inline
    def terms(values):
        return -(-values // whole) * group

    @inline
    def operand_row(values):
        return -(-values // lanes) * lanes * size

    return terms, operand_row
