"""Packing of weights into panels, and of packed gradients back into matrices.

A panel is what a block of ``numba_gemm.py`` reads for one k: ``4 * lanes`` adjacent values.  Two kinds:

* gate panels ``[panel][k][gate][lane]``: the four gates of ``lanes`` hidden units side by side, so that a block's four
  vectors are all that the cell of those units needs.  Units beyond H are zero.
* column panels ``[panel][k][column]``: ``4 * lanes`` columns of any matrix; the last panel is as wide as whole vectors need.
  Its k may run over gates in the order in which gate panels hold them: ``rows`` maps k to a row of the matrix, -1 is zero.

H hidden, K what the product sums over, U panels of ``lanes`` units.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numba
import numpy as np

from .jit import kernel
from .tiling import Block, ceil_div


def gate_order(hidden: int, lanes: int) -> np.ndarray:
    """Row of a (4H, ·) matrix for each position of a gate panel's columns, -1 beyond H: (U * 4 * lanes,)."""
    units = np.arange(ceil_div(hidden, lanes) * lanes).reshape(-1, 1, lanes)
    rows = units + np.arange(4).reshape(1, 4, 1) * hidden
    return np.where(units < hidden, rows, -1).reshape(-1)


def column_panels_size(depth: int, columns: int, lanes: int) -> int:
    """Values in the column panels of a (depth, columns) matrix."""
    return depth * ceil_div(columns, lanes) * lanes


@functools.lru_cache(maxsize=None)
def packers(scalar: str, block: Block) -> SimpleNamespace:
    """The compiled functions for matrices of ``scalar``; arrays are NumPy's, of any strides where read."""
    real = getattr(numba.types, scalar)
    matrix, flat, index = real[:, :], real[::1], numba.types.int64[::1]
    readable = numba.types.Array(real, 2, "A", readonly=True)
    lanes, panel = block.lanes, block.panel

    @kernel(numba.void(flat, readable), f"{scalar}{lanes}")
    def pack_gates(packed, weight):  # (U * K * 4 * lanes,), (4H, K)
        hidden, depth = weight.shape[0] // 4, weight.shape[1]
        for unit in range(-(-hidden // lanes) * lanes):
            first = unit // lanes * depth * panel + unit % lanes
            for gate in range(4):
                at = first + gate * lanes
                if unit < hidden:
                    row = weight[gate * hidden + unit]
                    for k in range(depth):
                        packed[at + k * panel] = row[k]
                else:
                    for k in range(depth):
                        packed[at + k * panel] = 0.0

    @kernel(numba.void(matrix, flat), f"{scalar}{lanes}")
    def unpack_gates(weight, packed):  # (4H, K), (U * K * 4 * lanes,)
        hidden, depth = weight.shape[0] // 4, weight.shape[1]
        for gate in range(4):
            for unit in range(hidden):
                at = unit // lanes * depth * panel + gate * lanes + unit % lanes
                row = weight[gate * hidden + unit]
                for k in range(depth):
                    row[k] = packed[at + k * panel]

    @kernel(numba.void(flat, readable, index), f"{scalar}{lanes}")
    def pack_columns(packed, weight, rows):  # (K * columns,), (·, columns), (K,)
        columns, depth = weight.shape[1], len(rows)
        at = 0
        for first in range(0, columns, panel):
            width = min(panel, -(-(columns - first) // lanes) * lanes)
            valid = min(width, columns - first)
            for k in range(depth):
                row = rows[k]
                for j in range(valid):
                    packed[at + j] = weight[row, first + j] if row >= 0 else 0.0
                for j in range(valid if row >= 0 else 0, width):
                    packed[at + j] = 0.0
                at += width

    @kernel(numba.void(matrix, flat), f"{scalar}{lanes}")
    def unpack_columns(weight, packed):  # (K, columns), (ceil(columns / panel) * K * panel,): whole panels
        depth, columns = weight.shape
        for j in range(columns):
            at = j // panel * depth * panel + j % panel
            for k in range(depth):
                weight[k, j] = packed[at + k * panel]

    return SimpleNamespace(
        pack_gates=pack_gates, unpack_gates=unpack_gates, pack_columns=pack_columns, unpack_columns=unpack_columns
    )
