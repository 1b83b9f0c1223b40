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
from typing import Any, NamedTuple

import numpy as np

from . import threads
from .arguments import make_read
from .jit import inline, kernel
from .numba_simd import load_int, simd
from .tiling import Block, ceil_div

WORTH_A_THREAD = 1 << 18  # values: some 100 microseconds of packing


class PackArgs(NamedTuple):
    """What a member is told (see ``arguments.py``); matrices are contiguous."""

    packed: int  # panels
    matrix: int
    depth: int  # K
    columns: int  # H, where the panels hold gates; else the columns of all panels
    rows: int  # of the matrix, for each k of the panels (int64); where it is packed in columns
    begin: int = 0  # panels of this member
    end: int = 0


class SumArgs(NamedTuple):
    """What a member is told."""

    target: int
    source: int
    begin: int = 0  # vectors of this member
    end: int = 0


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

    read, read_sum = make_read(PackArgs), make_read(SumArgs)

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

    @kernel(f"{scalar}{lanes}")
    def pack_gates(address):  # (4H, K) to (U * K * 4 * lanes,)
        a = read(address)
        for p in range(a.begin, a.end):
            units = min(lanes, a.columns - p * lanes)
            for gate in range(4):
                target = a.packed + p * a.depth * panel_bytes + gate * vector_bytes
                if units < lanes:
                    for k in range(a.depth):
                        store(target + k * panel_bytes, zeros())
                source = a.matrix + (gate * a.columns + p * lanes) * a.depth * size
                transpose(target, panel_bytes, source, a.depth * size, units, a.depth)

    @kernel(f"{scalar}{lanes}")
    def unpack_gates(address):  # (U * K * 4 * lanes,) to (4H, K)
        a = read(address)
        for p in range(a.begin, a.end):
            units = min(lanes, a.columns - p * lanes)
            for gate in range(4):
                source = a.packed + p * a.depth * panel_bytes + gate * vector_bytes
                target = a.matrix + (gate * a.columns + p * lanes) * a.depth * size
                done = 0
                if units == lanes:
                    while done + lanes <= a.depth:
                        transpose_tile(target + done * size, a.depth * size, source + done * panel_bytes, panel_bytes)
                        done += lanes
                for k in range(done, a.depth):
                    for u in range(units):
                        copy_one(target + (u * a.depth + k) * size, source + k * panel_bytes + u * size)

    @kernel(f"{scalar}{lanes}")
    def pack_columns(address):  # (·, columns) to (K * columns,)
        a = read(address)
        for q in range(a.begin, a.end):
            first = q * panel
            left = a.columns - first
            width = lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel
            for k in range(a.depth):
                target, row = a.packed + (first * a.depth + k * width) * size, load_int(a.rows + 8 * k)
                source = a.matrix + (row * a.columns + first) * size
                for j in range(0, width, lanes):
                    if row >= 0:
                        store(target + j * size, load_first(source + j * size, a.columns - first - j))
                    else:
                        store(target + j * size, zeros())

    @kernel(f"{scalar}{lanes}")
    def unpack_columns(address):  # (panels * K * panel,) to (K, columns)
        a = read(address)
        for q in range(a.begin, a.end):
            for k in range(a.depth):
                target = a.matrix + (k * a.columns + q * panel) * size
                source = a.packed + (q * a.depth + k) * panel_bytes
                for j in range(0, min(panel, a.columns - q * panel), lanes):
                    left = a.columns - q * panel - j
                    store_first(target + j * size, load_first(source + j * size, left), left)

    @kernel(f"{scalar}{lanes}")
    def add_to(address):
        a = read_sum(address)
        for at in range(a.begin * vector_bytes, a.end * vector_bytes, vector_bytes):
            store(a.target + at, load(a.target + at) + load(a.source + at))

    return SimpleNamespace(
        add_to=add_to,
        pack_gates=pack_gates,
        unpack_gates=unpack_gates,
        pack_columns=pack_columns,
        unpack_columns=unpack_columns,
    )


def share(function: Any, available: int, panels: int, values: int, record: PackArgs | SumArgs) -> None:
    """Runs a packer over ``panels`` panels, on as many of the available threads as ``values`` values are worth."""
    members = min(available, panels) if values >= WORTH_A_THREAD else 1
    shares = [(panels * m // members, panels * (m + 1) // members) for m in range(members)]
    threads.run(function, [record._replace(begin=begin, end=end) for begin, end in shares])
