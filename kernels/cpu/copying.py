"""Device functions that clear and copy rows."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from .jit import inline
from .variant import Variant


@functools.cache
def row_functions(variant: Variant) -> SimpleNamespace:
    """``clear``, ``copy``, ``clear_stored``, ``widen_row``, ``narrow_row``, ``copy_strips``."""
    ops, lanes, size, stored = variant.ops, variant.block.lanes, variant.size, variant.stored
    most, vector_bytes = variant.block.rows, variant.vector_bytes
    load, store, zeros = ops.load, ops.store, ops.zeros
    load_storage, store_storage = ops.make_load(variant.storage), ops.make_store(variant.storage)
    load_scalar, store_scalar = ops.make_load(variant.scalar), ops.make_store(variant.scalar)

    @inline
    def clear(address, count):
        """Zeroes ``count`` whole vectors."""
        for i in range(count):
            store(address + i * vector_bytes, zeros())

    @inline
    def copy(target, source, count):
        """Copies ``count`` whole vectors."""
        for i in range(count):
            store(target + i * vector_bytes, load(source + i * vector_bytes))

    @inline
    def clear_stored(address, count):
        """Zeroes ``count`` values of storage."""
        for i in range(0, count, lanes):
            store_storage(address + i * stored, zeros(), count - i)

    @inline
    def widen_row(target, source, count):
        """Copies ``count`` values of storage into the compute dtype."""
        for i in range(0, count, lanes):
            store_scalar(target + i * size, load_storage(source + i * stored, count - i), count - i)

    @inline
    def narrow_row(target, source, count):
        """Copies ``count`` values of the compute dtype into storage."""
        for i in range(0, count, lanes):
            store_storage(target + i * stored, load_scalar(source + i * size, count - i), count - i)

    @inline
    def copy_strips(target, source, count, k, rows, from_storage):
        """Copies ``count`` values into place k of the strips of a weight gradient, which have ``rows`` places each."""
        strips = -(-count // most)
        for j in range(strips):
            begin = count * j // strips
            width = count * (j + 1) // strips - begin
            at = target + (begin * rows + k * width) * size
            for i in range(0, width, lanes):  # once, unless a block has more rows than a vector has lanes
                if from_storage:
                    value = load_storage(source + (begin + i) * stored, width - i)
                else:
                    value = load_scalar(source + (begin + i) * size, width - i)
                store_scalar(at + i * size, value, width - i)

    return SimpleNamespace(
        clear=clear, copy=copy, clear_stored=clear_stored,
        widen_row=widen_row, narrow_row=narrow_row, copy_strips=copy_strips,
    )  # fmt: skip
