"""Products of rows with a packed matrix: those of the recurrence in backward, of dx, and of projections."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .jit import inline
from .memory import load_int
from .microkernel import make_block
from .steps import block_size
from .variant import Variant

NEAR_DEPTH = 512  # k of a strip of a product


class MatrixEnd(NamedTuple):
    """Where rows of a product go: to ``base`` and the row's of ``offsets``."""

    base: int
    offsets: int
    columns: int  # left
    add: int  # to what is there


def _make_product(variant: Variant, vectors: int):
    """The product of any number of rows with one panel that is ``vectors`` vectors wide."""
    ops, block = variant.ops, variant.block
    none, add_vectors = ops.make_zeros(vectors), ops.add_vectors

    def start(row, e):
        return none()

    def finish_matrix(row, sums, e):
        add_vectors(e.base + load_int(e.offsets + 8 * row), sums, e.columns, e.add)

    choices = block.row_choices(vectors)
    rows_block = make_block(ops, choices, vectors, start, finish_matrix, key=variant.key, registers=block.registers)

    @inline
    def product(rows, a, offsets, panels, stride, depth, w, after, base, targets, columns, add):
        done = 0
        quarter = panels * depth * 64  # bytes that a block fetches ahead
        ahead = after
        while done < rows:
            n = 1
            for choice in choices:
                if choice <= rows - done:
                    n = choice
            if vectors == 4:
                n = block_size(rows - done, choices[-1])
            rows_block(
                n,
                (a, offsets + 8 * done, panels, stride, depth, w, ahead),
                MatrixEnd(base, targets + 8 * done, columns, add),
            )
            done += n
            ahead += quarter

    return product


@functools.cache
def make_matrix_product(variant: Variant) -> Any:
    """``matrix_product`` for kernels."""
    lanes, panel, size = variant.block.lanes, variant.block.panel, variant.size
    product_1, product_2, product_4 = (_make_product(variant, vectors) for vectors in (1, 2, 4))

    @inline
    def job(i, first, last, strip):
        """The i-th part of a product: (first panel of k, column panel)."""
        return i // (last - first) * strip, first + i % (last - first)

    @inline
    def packed_at(k, q, panels, columns):
        """Where panel k of column panel q begins in a packed W, in values a row of k."""
        left = columns - q * panel
        return q * panels * panel + k * (lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel)

    @inline
    def matrix_product(rows, a, offsets, panels, stride, depth, w, first, last, columns, base, targets, back):
        """Column panels ``first`` to ``last`` of A W for ``rows`` rows; W has ``columns`` columns in all.

        Row r of A lies at ``a + offsets[r]``, in ``panels`` panels of ``depth`` values that are ``stride`` bytes
        apart; row r of the result goes to ``base + targets[r]``.

        k is cut in strips that leave both operands in the second-level cache.  The sums of the strips are added up,
        which keeps the error of long sums (4H terms of dx) near that of torch's blocked products.  ``back``: W is
        walked from its end; calls with the same W alternate, to begin with the weights that are still near.
        """
        strip = max(1, NEAR_DEPTH // depth)
        strips = -(-panels // strip)
        jobs = strips * (last - first)
        for i in range(jobs):
            k, q = job(jobs - 1 - i if back != 0 else i, first, last, strip)
            count = min(strip, panels - k)
            left = columns - q * panel
            w_q = w + packed_at(k, q, panels, columns) * depth * size
            # While a strip of a panel is multiplied, the next one is fetched.
            k_next, q_next = job(max(jobs - 2 - i, 0) if back != 0 else min(i + 1, jobs - 1), first, last, strip)
            after = w + packed_at(k_next, q_next, panels, columns) * depth * size
            a_k, at, add = a + k * stride, base + q * panel * size, 0 if i < last - first else 1
            if left > 2 * lanes:
                product_4(rows, a_k, offsets, count, stride, depth, w_q, after, at, targets, left, add)
            elif left > lanes:
                product_2(rows, a_k, offsets, count, stride, depth, w_q, after, at, targets, left, add)
            else:
                product_1(rows, a_k, offsets, count, stride, depth, w_q, after, at, targets, left, add)

    return matrix_product
