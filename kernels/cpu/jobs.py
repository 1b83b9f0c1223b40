"""Jobs before and after a launch: weights are packed into panels, states read and written, gradients unpacked.

For one call this is a list of jobs that one kernel processes: a call of a small layer takes less time than a Python
call per tensor would.  A job's panels, or rows, are divided among the members, which need not wait for one another: a
job depends on an earlier one of its list only through panels, and the panels of both go to the same member.

A panel is what a block of ``microkernel.py`` reads for one k: ``4 * lanes`` adjacent values.  Two kinds:

* gate panels ``[panel][k][gate][lane]``: the four gates of ``lanes`` hidden units are adjacent, so that a block's four
  vectors are all that the cell of those units needs.  Units beyond H are zero.
* column panels ``[panel][k][column]``: ``4 * lanes`` columns of any matrix; the last panel is 1, 2 or 4 vectors wide.
  Its k may run over gates in the order of gate panels: ``rows`` maps k to a row of the matrix, -1 stands for zeros.

Where a term of a product is a pair (see ``products.py``), a panel has pairs of k in place of k: of two adjacent values
of each column, the first one low.  There are as many as whole groups of terms take; those beyond K are zero.

H hidden, K what the product sums over, U panels of ``lanes`` units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..integers import ceil_div
from .jit import inline, kernel
from .memory import load_int, make_read
from .variant import Variant, row_sizes

VALUES_WORTH_THREADS = 1 << 18  # values: some 100 microseconds of packing

PACK_GATES, PACK_BIAS, PACK_COLUMNS, UNPACK_GATES, UNPACK_COLUMNS = range(5)
ROWS_IN, ROWS_OUT, OPERANDS_IN, OPERANDS_OUT = range(5, 9)


class Job(NamedTuple):
    """One job of a list; matrices are contiguous, weights in the dtype of operands, the rest in the compute dtype.

    * PACK_GATES: (4H, K) to gate panels.  PACK_BIAS: the sum of two (4H,), or zeros, likewise, K = 1.
    * PACK_COLUMNS: (·, columns) to column panels.
    * UNPACK_GATES, UNPACK_COLUMNS: the inverse, all columns in whole panels; several parts are added up into the first.
    * ROWS_IN: rows of a tensor of the caller's dtype to rows of whole vectors, padded with zeros.  ROWS_OUT: the
      inverse.  OPERANDS_IN, OPERANDS_OUT: likewise, to and from rows of operands.
    """

    op: int  # PACK_GATES, ...
    items: int  # number of panels, or rows, which are divided among the members
    target: int
    source: int  # 0: zeros
    depth: int = 0  # K
    columns: int = 0  # H of gates; columns of a matrix; values of a row
    rows: int = 0  # PACK_COLUMNS: int64 matrix row for each k
    other: int = 0  # PACK_BIAS: the second; 0: none
    parts: int = 1  # UNPACK_*: at ``source`` and every ``part_stride`` bytes after it
    part_stride: int = 0
    target_rows: int = 0  # ROWS_*: int64 offsets
    source_rows: int = 0
    panel_bytes: int = 0  # PACK_GATES: from a panel to the next


class JobsArgs(NamedTuple):
    """Arguments of one member (see ``arguments.py``)."""

    jobs: int
    length: int  # jobs in the list
    member: int
    members: int


@functools.lru_cache(maxsize=256)
def gate_order(hidden: int, lanes: int) -> np.ndarray:
    """Row of a (4H, ·) matrix for each column of the gate panels, -1 beyond H: (U * 4 * lanes,)."""
    units = np.arange(ceil_div(hidden, lanes) * lanes).reshape(-1, 1, lanes)
    rows = units + np.arange(4).reshape(1, 4, 1) * hidden
    return np.where(units < hidden, rows, -1).reshape(-1)


def column_panels_size(depth: int, columns: int, lanes: int) -> int:
    """Terms in the column panels of a (depth, columns) matrix; ``depth`` in terms."""
    whole, rest = divmod(columns, 4 * lanes)
    return depth * lanes * (4 * whole + (0, 1, 2, 4, 4)[ceil_div(rest, lanes)])


@functools.cache
def _make_add_parts(variant: Variant) -> Any:
    """A function that adds the other parts of an UNPACK job to the first, bytes ``begin`` to ``end`` of each."""
    load, store, vector_bytes = variant.ops.load, variant.ops.store, variant.vector_bytes

    @inline
    def add_parts(job, begin, end):
        for part in range(1, job.parts):
            for at in range(job.source + begin, job.source + end, vector_bytes):
                store(at, load(at) + load(at + part * job.part_stride))

    return add_parts


@functools.cache
def _gate_jobs(variant: Variant) -> Any:
    """(pack_gates, pack_bias, unpack_gates) of panels ``begin`` to ``end``.

    Gate panels are transposes, made tile by tile in registers: element by element they took three to four times as
    long (H = 1024: 11.8 ms a weight, in tiles 4.0).
    """
    ops, lanes, size = variant.ops, variant.block.lanes, variant.size
    vector_bytes, panel_bytes = variant.vector_bytes, variant.gate_bytes
    store, zeros, transpose_tile, copy_one = ops.store, ops.zeros, ops.transpose_tile, ops.copy_one
    copy_half, operand_size, values = ops.copy_half, variant.operand_size, variant.products.values
    terms, _ = row_sizes(variant)
    load_first, add_parts = ops.make_load(variant.scalar), _make_add_parts(variant)

    @inline
    def pack_gates(job, begin, end):
        row, whole, odd = job.depth * operand_size, job.depth // values, job.depth % values
        for p in range(begin, end):
            units = min(lanes, job.columns - p * lanes)
            for gate in range(4):
                target = job.target + p * job.panel_bytes + gate * vector_bytes
                source = job.source + (gate * job.columns + p * lanes) * row
                done = 0
                if units == lanes:
                    while done + lanes <= whole:
                        transpose_tile(target + done * panel_bytes, panel_bytes, source + done * size, row)
                        done += lanes
                for k in range(done, terms(job.depth)):
                    if units < lanes or k >= whole:
                        store(target + k * panel_bytes, zeros())
                    for u in range(units if k < whole else 0):
                        copy_one(target + k * panel_bytes + u * size, source + u * row + k * size)
                    for u in range(units if k == whole and odd != 0 else 0):  # half a pair
                        copy_half(target + k * panel_bytes + u * size, source + u * row + k * size)

    @inline
    def pack_bias(job, begin, end):
        for p in range(begin, end):
            for gate in range(4):
                value = zeros()
                at, left = (gate * job.columns + p * lanes) * size, job.columns - p * lanes
                if job.source != 0:
                    value = load_first(job.source + at, left)
                if job.other != 0:
                    value = value + load_first(job.other + at, left)
                store(job.target + p * panel_bytes + gate * vector_bytes, value)

    @inline
    def unpack_gates(job, begin, end):
        row, panel_size = job.depth * size, job.depth * panel_bytes
        add_parts(job, begin * panel_size, end * panel_size)
        for p in range(begin, end):
            units = min(lanes, job.columns - p * lanes)
            for gate in range(4):
                source = job.source + p * panel_size + gate * vector_bytes
                target = job.target + (gate * job.columns + p * lanes) * row
                done = 0
                if units == lanes:
                    while done + lanes <= job.depth:
                        transpose_tile(target + done * size, row, source + done * panel_bytes, panel_bytes)
                        done += lanes
                for k in range(done, job.depth):
                    for u in range(units):
                        copy_one(target + u * row + k * size, source + k * panel_bytes + u * size)

    return pack_gates, pack_bias, unpack_gates


@functools.cache
def _column_jobs(variant: Variant) -> Any:
    """(pack_columns, unpack_columns) of panels ``begin`` to ``end``."""
    (terms, _), operand_size, load_pairs = row_sizes(variant), variant.operand_size, variant.ops.load_pairs
    ops, lanes, panel, size = variant.ops, variant.block.lanes, variant.block.panel, variant.size
    panel_bytes, store, zeros = variant.gate_bytes, ops.store, ops.zeros
    load_first, store_first = ops.make_load(variant.scalar), ops.make_store(variant.scalar)
    add_parts = _make_add_parts(variant)

    @inline
    def row_at(job, k):
        return load_int(job.rows + 8 * k) if k < job.depth else -1

    @inline
    def pack_pairs(job, begin, end):
        for q in range(begin, end):
            first = q * panel
            left = job.columns - first
            width = lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel
            depth = terms(job.depth)
            for k in range(depth):
                target = job.target + (first * depth + k * width) * size
                one, two = row_at(job, 2 * k), row_at(job, 2 * k + 1)
                row_one = job.source + (one * job.columns + first) * operand_size
                row_two = job.source + (two * job.columns + first) * operand_size
                for j in range(0, width, lanes):
                    pairs = load_pairs(
                        row_one + j * operand_size, left - j if one >= 0 else 0,
                        row_two + j * operand_size, left - j if two >= 0 else 0,
                    )  # fmt: skip
                    store(target + j * size, pairs)

    @inline
    def pack_columns(job, begin, end):
        for q in range(begin, end):
            first = q * panel
            left = job.columns - first
            width = lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel
            for k in range(job.depth):
                target, row = job.target + (first * job.depth + k * width) * size, load_int(job.rows + 8 * k)
                source = job.source + (row * job.columns + first) * size
                for j in range(0, width, lanes):
                    if row >= 0:
                        store(target + j * size, load_first(source + j * size, left - j))
                    else:
                        store(target + j * size, zeros())

    @inline
    def unpack_columns(job, begin, end):
        add_parts(job, begin * job.depth * panel_bytes, end * job.depth * panel_bytes)
        for q in range(begin, end):
            for k in range(job.depth):
                target = job.target + (k * job.columns + q * panel) * size
                source = job.source + (q * job.depth + k) * panel_bytes
                for j in range(0, min(panel, job.columns - q * panel), lanes):
                    left = job.columns - q * panel - j
                    store_first(target + j * size, load_first(source + j * size, left), left)

    return pack_pairs if variant.products.paired else pack_columns, unpack_columns


@functools.cache
def _row_jobs(variant: Variant) -> Any:
    """(rows_in, rows_out, operands_in, operands_out) of rows ``begin`` to ``end``."""
    ops, lanes, size, stored = variant.ops, variant.block.lanes, variant.size, variant.stored
    store, zeros = ops.store, ops.zeros
    load_storage, store_storage = ops.make_load(variant.storage), ops.make_store(variant.storage)
    load_scalar, load_operand, store_operand = (
        ops.make_load(variant.scalar), ops.make_load(variant.operand), ops.make_store(variant.operand)
    )  # fmt: skip
    operand_size, operand_row = variant.operand_size, row_sizes(variant)[1]

    @inline
    def operands_in(job, begin, end):
        for r in range(begin, end):
            target = job.target + load_int(job.target_rows + 8 * r)
            for i in range(0, operand_row(job.columns) // operand_size, lanes):
                value = zeros()
                if job.source != 0:
                    value = load_storage(job.source + load_int(job.source_rows + 8 * r) + i * stored, job.columns - i)
                store_operand(target + i * operand_size, value, lanes)

    @inline
    def operands_out(job, begin, end):
        for r in range(begin, end):
            target = job.target + load_int(job.target_rows + 8 * r)
            source = job.source + load_int(job.source_rows + 8 * r)
            for i in range(0, job.columns, lanes):
                left = job.columns - i
                store_storage(target + i * stored, load_operand(source + i * operand_size, left), left)

    @inline
    def rows_in(job, begin, end):
        for r in range(begin, end):
            target = job.target + load_int(job.target_rows + 8 * r)
            for i in range(0, job.columns, lanes):
                value = zeros()
                if job.source != 0:
                    value = load_storage(job.source + load_int(job.source_rows + 8 * r) + i * stored, job.columns - i)
                store(target + i * size, value)

    @inline
    def rows_out(job, begin, end):
        for r in range(begin, end):
            target = job.target + load_int(job.target_rows + 8 * r)
            source = job.source + load_int(job.source_rows + 8 * r)
            for i in range(0, job.columns, lanes):
                left = job.columns - i
                store_storage(target + i * stored, load_scalar(source + i * size, left), left)

    return rows_in, rows_out, operands_in, operands_out


@functools.cache
def jobs_kernel(variant: Variant) -> Any:
    """The compiled kernel."""
    pack_gates, pack_bias, unpack_gates = _gate_jobs(variant)
    pack_columns, unpack_columns = _column_jobs(variant)
    rows_in, rows_out, operands_in, operands_out = _row_jobs(variant)
    read, read_job, job_bytes = make_read(JobsArgs), make_read(Job), 8 * len(Job._fields)

    @kernel(variant.key)
    def lstm_jobs_kernel(address):
        a = read(address)
        for index in range(a.length):
            job = read_job(a.jobs + index * job_bytes)
            begin, end = job.items * a.member // a.members, job.items * (a.member + 1) // a.members
            if job.op == PACK_GATES:
                pack_gates(job, begin, end)
            elif job.op == PACK_BIAS:
                pack_bias(job, begin, end)
            elif job.op == PACK_COLUMNS:
                pack_columns(job, begin, end)
            elif job.op == UNPACK_GATES:
                unpack_gates(job, begin, end)
            elif job.op == UNPACK_COLUMNS:
                unpack_columns(job, begin, end)
            elif job.op == ROWS_IN:
                rows_in(job, begin, end)
            elif job.op == ROWS_OUT:
                rows_out(job, begin, end)
            elif job.op == OPERANDS_IN:
                operands_in(job, begin, end)
            else:
                operands_out(job, begin, end)

    return lstm_jobs_kernel
