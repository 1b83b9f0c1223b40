"""Products of rows with a packed matrix: those of the recurrence in backward, of dx, and of projections."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .jit import inline
from .memory import load_int
from .microkernel import Around, make_block
from .steps import block_size
from .variant import Variant

NEAR_DEPTH = 512  # terms per strip of a product


class Left(NamedTuple):
    """Rows of a matrix: row r has ``panels`` panels of ``depth`` terms, ``stride`` bytes apart, from its offset on."""

    address: int
    offsets: int  # of rows
    panels: int
    stride: int
    depth: int


class Right(NamedTuple):
    """Column panels ``first`` to ``last`` of a packed matrix of ``columns`` columns.

    ``back``: in reverse; products with the same matrix alternate, to begin with weights that are still in the cache.
    """

    address: int
    first: int
    last: int
    columns: int
    back: int


class MatrixEnd(NamedTuple):
    """Destination of a product: row r at ``base + offsets[r]``."""

    base: int
    offsets: int
    columns: int  # from this panel on
    add: int  # 1: add to what is there


def _make_product(variant: Variant, vectors: int):
    """The product of any number of rows with one panel that is ``vectors`` vectors wide."""
    block, tiled, add_vectors = variant.block, variant.products.tiled, variant.ops.add_vectors

    def finish_matrix(row, sums, e):
        add_vectors(e.base + load_int(e.offsets + 8 * row), sums, e.columns, e.add)

    choices = block.row_choices(vectors)
    most = block.rows if tiled else choices[-1]
    rows_block = make_block(variant, vectors, Around(finish_matrix))

    @inline
    def product(rows, left, w, ahead, end):
        """``ahead``: memory that is needed next; each block prefetches a part of it."""
        done = 0
        while done < rows:
            n = 1
            for choice in choices:
                if choice <= rows - done:
                    n = choice
            if vectors == 4 or tiled:
                n = block_size(rows - done, most)
            rows_block(
                n,
                (left.address, left.offsets + 8 * done, left.panels, left.stride, left.depth, w, ahead),
                MatrixEnd(end.base, end.offsets + 8 * done, end.columns, end.add),
            )
            done += n
            ahead += left.panels * left.depth * 64

    return product


@functools.cache
def make_matrix_product(variant: Variant) -> Any:
    """``matrix_product`` for kernels."""
    lanes, panel, size = variant.block.lanes, variant.block.panel, variant.size
    product_1, product_2, product_4 = (_make_product(variant, vectors) for vectors in (1, 2, 4))

    @inline
    def job(i, right, strip):
        """The i-th part of a product: (first panel of k, column panel)."""
        return i // (right.last - right.first) * strip, right.first + i % (right.last - right.first)

    @inline
    def packed_at(left, right, k, q):
        """Address of panel k of column panel q."""
        columns = right.columns - q * panel
        width = lanes if columns <= lanes else 2 * lanes if columns <= 2 * lanes else panel
        return right.address + (q * left.panels * panel + k * width) * left.depth * size

    @inline
    def matrix_product(rows, left, right, base, targets):
        """``rows`` rows of ``left`` times ``right``; row r goes to ``base + targets[r]``.

        k is split into strips for which both operands stay in the second-level cache.  The sums of the strips are added
        up, which keeps the error of long sums (4H terms of dx) near that of torch's blocked products.
        """
        strip = max(1, NEAR_DEPTH // left.depth)
        jobs = -(-left.panels // strip) * (right.last - right.first)
        for i in range(jobs):
            k, q = job(jobs - 1 - i if right.back != 0 else i, right, strip)
            # While a strip of a panel is multiplied, the next one is prefetched.
            k_next, q_next = job(max(jobs - 2 - i, 0) if right.back != 0 else min(i + 1, jobs - 1), right, strip)
            w, ahead = packed_at(left, right, k, q), packed_at(left, right, k_next, q_next)
            count, columns = min(strip, left.panels - k), right.columns - q * panel
            some = Left(left.address + k * left.stride, left.offsets, count, left.stride, left.depth)
            end = MatrixEnd(base + q * panel * size, targets, columns, 0 if i < right.last - right.first else 1)
            if columns > 2 * lanes:
                product_4(rows, some, w, ahead, end)
            elif columns > lanes:
                product_2(rows, some, w, ahead, end)
            else:
                product_1(rows, some, w, ahead, end)

    return matrix_product
