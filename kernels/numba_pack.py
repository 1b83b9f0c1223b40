"""Packing of weights into panels, and of packed gradients back into matrices.

A panel is what a block of ``numba_gemm.py`` reads for one k: ``4 * lanes`` adjacent values.  Two kinds:

* gate panels ``[panel][k][gate][lane]``: the four gates of ``lanes`` hidden units side by side, so that a block's four
  vectors are all that the cell of those units needs.  Units beyond H are zero.
* column panels ``[panel][k][column]``: ``4 * lanes`` columns of any matrix; the last panel is 1, 2 or 4 vectors wide.
  Its k may run over gates in the order in which gate panels hold them: ``rows`` maps k to a row of the matrix, -1 is
  zero.

H hidden, K what the product sums over, U panels of ``lanes`` units.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numba
import numpy as np

from . import threads
from .jit import inline, kernel
from .numba_simd import load_int, simd
from .tiling import Block, ceil_div

WORTH_A_THREAD = 1 << 18  # values: some 100 microseconds of packing


@functools.lru_cache(maxsize=256)
def gate_order(hidden: int, lanes: int) -> np.ndarray:
    """Row of a (4H, ·) matrix for each position of a gate panel's columns, -1 beyond H: (U * 4 * lanes,)."""
    units = np.arange(ceil_div(hidden, lanes) * lanes).reshape(-1, 1, lanes)
    rows = units + np.arange(4).reshape(1, 4, 1) * hidden
    return np.where(units < hidden, rows, -1).reshape(-1)


def column_panels_size(depth: int, columns: int, lanes: int) -> int:
    """Values in the column panels of a (depth, columns) matrix."""
    whole, rest = divmod(columns, 4 * lanes)
    return depth * lanes * (4 * whole + (0, 1, 2, 4, 4)[ceil_div(rest, lanes)])


@functools.cache
def packers(scalar: str, block: Block) -> SimpleNamespace:
    """The compiled functions for contiguous matrices of ``scalar``, given by address.

    Each packs panels ``begin`` to ``end``.  Gate panels are transposes, made tile by tile in registers: element by
    element they took three to four times as long (H = 1024: 11.8 ms a weight, in tiles 4.0).
    """
    ops = simd(scalar, block.lanes)
    lanes, panel, size = block.lanes, block.panel, ops.size
    vector_bytes, panel_bytes = lanes * ops.size, block.panel * ops.size
    load, store, zeros, transpose_tile, copy_one = ops.load, ops.store, ops.zeros, ops.transpose_tile, ops.copy_one
    load_first, store_first = ops.make_load(scalar), ops.make_store(scalar)

    @inline
    def transpose(target, target_row, source, source_row, rows, columns):
        """(columns, rows) from (rows, columns), rows <= lanes."""
        done = 0
        if rows == lanes:
            while done + lanes <= columns:
                transpose_tile(target + done * target_row, target_row, source + done * size, source_row)
                done += lanes
        for k in range(done, columns):
            for r in range(rows):
                copy_one(target + k * target_row + r * size, source + r * source_row + k * size)

    @kernel(numba.void(*[numba.int64] * 6), f"{scalar}{lanes}")
    def pack_gates(packed, weight, hidden, depth, begin, end):  # (U * K * 4 * lanes,), (4H, K)
        for p in range(begin, end):
            units = min(lanes, hidden - p * lanes)
            for gate in range(4):
                target = packed + p * depth * panel_bytes + gate * vector_bytes
                if units < lanes:
                    for k in range(depth):
                        store(target + k * panel_bytes, zeros())
                source = weight + (gate * hidden + p * lanes) * depth * size
                transpose(target, panel_bytes, source, depth * size, units, depth)

    @kernel(numba.void(*[numba.int64] * 6), f"{scalar}{lanes}")
    def unpack_gates(weight, packed, hidden, depth, begin, end):  # (4H, K), (U * K * 4 * lanes,)
        for p in range(begin, end):
            units = min(lanes, hidden - p * lanes)
            for gate in range(4):
                source = packed + p * depth * panel_bytes + gate * vector_bytes
                target = weight + (gate * hidden + p * lanes) * depth * size
                done = 0
                if units == lanes:
                    while done + lanes <= depth:
                        transpose_tile(target + done * size, depth * size, source + done * panel_bytes, panel_bytes)
                        done += lanes
                for k in range(done, depth):
                    for u in range(units):
                        copy_one(target + (u * depth + k) * size, source + k * panel_bytes + u * size)

    @kernel(numba.void(*[numba.int64] * 7), f"{scalar}{lanes}")
    def pack_columns(packed, weight, rows, depth, columns, begin, end):  # (K * columns,), (·, columns), (K,)
        for q in range(begin, end):
            first = q * panel
            left = columns - first
            width = lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel
            for k in range(depth):
                target, row = packed + (first * depth + k * width) * size, load_int(rows + 8 * k)
                source = weight + (row * columns + first) * size
                for j in range(0, width, lanes):
                    if row >= 0:
                        store(target + j * size, load_first(source + j * size, columns - first - j))
                    else:
                        store(target + j * size, zeros())

    @kernel(numba.void(*[numba.int64] * 6), f"{scalar}{lanes}")
    def unpack_columns(weight, packed, depth, columns, begin, end):  # (K, columns), (panels * K * panel,)
        for q in range(begin, end):
            for k in range(depth):
                target = weight + (k * columns + q * panel) * size
                source = packed + (q * depth + k) * panel_bytes
                for j in range(0, min(panel, columns - q * panel), lanes):
                    left = columns - q * panel - j
                    store_first(target + j * size, load_first(source + j * size, left), left)

    @kernel(numba.void(*[numba.int64] * 4), f"{scalar}{lanes}")
    def add_to(target, source, begin, end):  # vectors ``begin`` to ``end`` of both
        for at in range(begin * vector_bytes, end * vector_bytes, vector_bytes):
            store(target + at, load(target + at) + load(source + at))

    return SimpleNamespace(
        add_to=add_to,
        pack_gates=pack_gates,
        unpack_gates=unpack_gates,
        pack_columns=pack_columns,
        unpack_columns=unpack_columns,
    )


def share(function, available: int, panels: int, values: int, *arguments: int) -> None:
    """Runs a packer over ``panels`` panels, on as many of the available threads as ``values`` values are worth."""
    members = min(available, panels) if values >= WORTH_A_THREAD else 1
    calls = [(*arguments, panels * m // members, panels * (m + 1) // members) for m in range(members)]
    threads.run(function, calls)
