"""Device functions that clear and copy rows."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from .jit import inline
from .memory import load_int
from .variant import Variant, row_sizes


@functools.cache
def row_functions(variant: Variant) -> SimpleNamespace:
    """``clear``, ``copy``, ``clear_operand``, ``copy_operand``, ``clear_stored``, ``operand_row``, ``narrow_row``,
    ``narrow_operand``, ``fill_strips``, ``strip_begin``."""
    ops, lanes, size, stored = variant.ops, variant.block.lanes, variant.size, variant.stored
    most, vector_bytes = variant.block.rows, variant.vector_bytes
    load, store, zeros = ops.load, ops.store, ops.zeros
    load_storage, store_storage = ops.make_load(variant.storage), ops.make_store(variant.storage)
    load_scalar, store_scalar = ops.make_load(variant.scalar), ops.make_store(variant.scalar)
    load_operand, store_operand = ops.make_load(variant.operand), ops.make_store(variant.operand)
    operand_size, operand_bytes = variant.operand_size, lanes * variant.operand_size
    _, operand_row_bytes = row_sizes(variant)
    values, tiled = variant.products.values, variant.products.tiled
    load_pairs, pair_tile = ops.load_pairs, ops.pair_tile
    padded = variant.products.paired  # a pair, or a group of them, may end beyond the row

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
    def clear_operand(address, count):
        """Zeroes ``count`` whole vectors of operands."""
        for i in range(count):
            store_operand(address + i * operand_bytes, zeros(), lanes)

    @inline
    def copy_operand(target, source, count):
        """Copies ``count`` whole vectors of operands."""
        for i in range(count):
            store_operand(target + i * operand_bytes, load_operand(source + i * operand_bytes, lanes), lanes)

    @inline
    def operand_row(target, source, count):
        """Copies ``count`` values of storage into a row of operands; if these are pairs, zeros follow to its end."""
        whole = operand_row_bytes(count) // operand_size if padded else count
        for i in range(0, whole, lanes):
            value = load_storage(source + i * stored, count - i)
            store_operand(target + i * operand_size, value, whole - i)

    @inline
    def narrow_row(target, source, count):
        """Copies ``count`` values of the compute dtype into storage."""
        for i in range(0, count, lanes):
            store_storage(target + i * stored, load_scalar(source + i * size, count - i), count - i)

    @inline
    def narrow_operand(target, source, count):
        """Copies ``count`` values of the compute dtype into operands."""
        for i in range(0, count, lanes):
            value = load_scalar(source + i * size, count - i)
            store_operand(target + i * operand_size, value, lanes if padded else count - i)

    @inline
    def strip_begin(count, j):
        """The first column of strip j of ``count`` columns: strips are equal, or as wide as a tile."""
        if tiled:
            return min(j * most, count)
        strips = -(-count // most)
        return count * j // strips

    @inline
    def fill_strips(target, rows, count, k, depth):
        """Copies the rows of storage at the addresses in ``rows``, tokens k and those of the same group of terms, into
        the strips of a weight gradient, which have ``depth`` terms each."""
        if tiled:
            at = target + k // 2 * most * size
            for i in range(0, count, most):
                pair_tile(at + i * depth * size, rows, i * stored, count - i)
            return
        for j in range(-(-count // most)):
            begin = strip_begin(count, j)
            width = strip_begin(count, j + 1) - begin
            at = target + (begin * depth + k // values * width) * size
            for i in range(0, width, lanes):  # once, unless a block has more rows than a vector has lanes
                if values == 2:
                    one, two = load_int(rows) + (begin + i) * stored, load_int(rows + 8) + (begin + i) * stored
                    value = load_pairs(one, width - i, two, width - i)
                else:
                    value = load_storage(load_int(rows) + (begin + i) * stored, width - i)
                store_scalar(at + i * size, value, width - i)

    return SimpleNamespace(
        clear=clear, copy=copy, clear_stored=clear_stored,
        clear_operand=clear_operand, copy_operand=copy_operand, operand_row=operand_row,
        narrow_row=narrow_row, narrow_operand=narrow_operand, fill_strips=fill_strips,
        strip_begin=strip_begin,
    )  # fmt: skip
