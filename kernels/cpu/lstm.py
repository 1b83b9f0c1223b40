"""The time loop, forward and backward: the code that each thread of a launch runs.

One launch is one direction of one layer, in backward one part of its batch (``tiling.parts``); launches run side by
side where threads allow.  T steps, B rows sorted so that row r is alive where r < batch_sizes[t], I input, H hidden, P
what the recurrence carries (the projection, or H), U panels of ``lanes`` hidden units, padded sizes H' = U * lanes and
P' likewise.  N counts (step, row) pairs; n = row_starts[t] + r.  All addresses, strides and offsets are in bytes.

Memory, beside the tensors of the caller:

* ``h`` (2, B, P'): h_{t-1} and h_t, by turns, in the compute dtype; both start as h_0, so a row that comes to life late
  (direction 1) finds it.  ``c`` (B, H'): the cell state, updated in place.  Resets zero their rows.  The rows of
  different row groups lie pages apart; each member is given ``h``, ``c`` and the like as if all lay as its own do.
* ``z`` (rows of a chunk, U, 4, lanes): the projected input; the cell's sums start from it.  Training in the compute
  dtype projects straight into ``gates``, which the cell then overwrites: the same lines, hot.
* ``gates`` (N, U, 4, lanes), in the caller's dtype, and ``cells`` (N, H'): saved for backward.
* ``dz`` (U, rows of a chunk, 4, lanes): panel by panel, so that weight gradients read it straight through.  Row k of
  a chunk of a part counts the (step, row) pairs of that part.

Denormal numbers count as zero inside (float32: below 1.2e-38).  A vanishing gradient, which is what a default LSTM's is
when its loss reads the last step, passes through them on its way to zero and would stay there for tens of thousands of
multiplications at a hundred cycles each.

Sharing.  A member of a launch owns a range of rows and a range of panels; ``sync`` keeps members together: once
a step where panels are shared out (h_t has to be whole before step t + 1), else not at all in forward and twice a
chunk in backward (where a part has one member: never).  Who owns what never changes a sum, so the bits do not depend
on it.

What decided this form, and what was tried (AVX-512 with 2 MiB of second-level cache, float32, two cores; GF/s of
multiplications and additions, of a peak of 220 to 270):

* The cell runs as a loop over the rows of a block, the three sigmoids and the tanh of a row side by side: 30 ns for 16
  units of a row, where the same arithmetic unrolled over the block's rows took 45 to 55 (constants and sums spilled,
  and one row's chain of dependent instructions at a time).  Two rows side by side brought another 8 %: not worth the
  code.
* Projection inside the recurrence (``fused``) pays for small inputs only: at H = I = 128, B = 32, 93 against 121.
* Weight gradients from copied strips, and matrix products in strips of k: training at H = 1024, B = 32 went from
  113 to 144.  They are summed per chunk in registers, then added: two-level sums also keep the error at torch's level.
* The next panel of weights is fetched while one is multiplied, a line of it a k: without that, inference at H = 1024
  takes 1.05 to 1.13 times as long, with two or four lines a k 1.02 to 1.18 times; a distance of 2 to 8 KiB in the same
  panel instead of the next panel, 1.1 times.
* Every other step walks the weights backwards, to begin with those still near: B = 1 at H = 512 and 1024 gains 1.09 to
  1.18, B = 8 1.02 to 1.05.
* No gain, within the noise of 3 %: blocks of 8 or 12 rows x 2 vectors for dh and dx, which halve the traffic from the
  second-level cache; strips of 128, 192 or 256 k; chunks of 128, 384 or 512 rows in backward; chunks of 192 to 384
  rows in forward (slower at H = 512); waking the threads before the packing (slower).
* What is left at H = 1024 is the third-level cache: with all panels of weights at one address, one thread gains 1.29
  at B = 32, 1.6 at B = 8 and 2 at B = 1.
* Sharing units instead of rows: within 3 % of each other where both can work (H >= 256), better by a fifth where the
  weights of one core's share fit its cache and all of them do not (H = 512, B = 8: 128 against 100), worse below.
* On a pool of our own, no operation of torch's between launches that would wake torch's threads: these spin for
  milliseconds on the cores that a lockstep needs (backward at H = 128, B = 1: 10.9 ms, without it 6.1).  As members of
  torch's team the launches stand behind an operation of torch's as well as alone.
* Not done: AMX for bfloat16.  A block of 16 rows on its tiles ran at 370 GF/s a core from Numba, three times this one.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

from .. import cell
from .arguments import make_read
from .jit import inline, kernel
from .microkernel import make_block
from .simd import SIZE, fetch, flush_denormals, load_byte, load_int, set_mode, simd, store_double, store_int
from .sync import arrive_and_wait
from .tiling import Block

NEAR_DEPTH = 512  # k of a strip of a matrix product
JOINED_ROWS = 192  # rows that share a strip of W_ih while it is near
NORM_PANELS = 4  # panels of a partial sum of a norm: those of a column panel, which no two members share


class ForwardArgs(NamedTuple):
    """What a member of ``lstm_fwd_kernel`` is told (see ``arguments.py``): addresses, bytes, counts."""

    # outputs
    y: int  # of this direction, (rows, P)
    gates: int  # (N, U, 4, lanes); 0: inference
    cells: int  # (N, H'); 0: not wanted
    # state and scratch
    h: int  # (2, B, P')
    c: int  # (B, H')
    m: int  # (B, H'): o tanh(c), before the projection; 0 without one
    z: int  # see above; 0: in gates
    x_stage: int  # (members, rows of a chunk, I): x in the compute dtype; 0: x is
    table: int  # (members, 2, rows of a chunk) int64
    # inputs
    x: int
    w_x: int  # gate panels of W_ih
    w_h: int  # gate panels of W_hh
    w_r: int  # column panels of W_hr^T
    bias: int  # (U, 4, lanes)
    reset: int  # bytes; 0: none
    # sizes
    steps: int
    batch: int
    inputs: int
    hidden: int
    width: int  # P
    chunk: int
    chunk_rows: int
    fused: int
    reverse: int
    batch_sizes: int  # (T,) int64; 0: B
    row_starts: int  # (T + 1,) int64; 0: t * B
    packed: int  # user tensors are indexed by row_starts[t], not by t
    # strides and offsets
    x_step: int
    x_rows: int  # (B,) int64 offsets
    y_step: int
    y_rows: int
    reset_step: int
    reset_rows: int
    h_rows: int  # (B,) offsets of rows of h
    h_half: int  # from h_{t-1} to h_t
    m_rows: int
    # sharing
    row_begin: int
    row_end: int
    panel_begin: int
    panel_end: int
    column_begin: int  # column panels of P
    column_end: int
    lockstep: int  # panels are shared out: one hand-off a step
    member: int
    members: int
    counter: int


class BackwardArgs(NamedTuple):
    """What a member of ``lstm_bwd_kernel`` is told; see ``ForwardArgs``."""

    # outputs
    dx: int  # (rows, I); 0: not wanted
    dw_x: int  # gate panels, of this part; 0: weights not wanted
    dw_h: int
    dw_r: int  # (column panels of P, H, panel); 0 without projection
    db: int  # (U, 4, lanes)
    norms: int  # (2, T, B, blocks of NORM_PANELS panels) float64 sums of squares, zero where not alive; 0: not wanted
    # state and scratch
    dh: int  # (B, P'): in: dL/dh_n, out: dL/dh_0
    dc: int  # (B, H'): in: dL/dc_n, out: dL/dc_0
    dm: int  # (B, H'); 0 without projection
    dz: int  # (U, rows of a chunk, 4, lanes)
    dh_chunk: int  # (column panels of P, rows of a chunk, panel); 0 without projection
    x_strips: int  # (strips of I, rows of a chunk, columns of a strip); 0: no weights wanted
    h_strips: int  # h_{t-1}, likewise
    m_strips: int  # likewise
    dx_stage: int  # (rows of a chunk, I): dx in the compute dtype; 0: it is
    table: int  # (rows of a chunk,) int64: rows of dx
    # inputs
    dy: int  # 0: none
    dcells: int  # (N, H') in the order of cells; 0: none
    gates: int
    cells: int
    x: int
    y: int
    h_0: int  # (B, P')
    c_0: int  # (B, H')
    zero: int  # a row of zeros, as long as the longest
    w_h: int  # column panels of W_hh, k in gate order
    w_x: int  # column panels of W_ih, k in gate order
    w_r: int  # column panels of W_hr
    reset: int
    # sizes
    steps: int
    batch: int
    inputs: int
    hidden: int
    width: int
    chunk: int
    chunk_rows: int
    reverse: int
    batch_sizes: int
    row_starts: int
    packed: int
    part_begin: int  # rows of this part
    part_end: int
    part_starts: int  # (T + 1,) int64: k of row ``part_begin`` at step t, counted from the first step; 0: t * rows
    # strides and offsets
    x_step: int
    x_rows: int
    y_step: int
    y_rows: int
    dx_step: int
    dx_rows: int
    dy_step: int
    dy_rows: int
    reset_step: int
    reset_rows: int
    h_rows: int
    m_rows: int
    panel_rows: int  # (rows of a block,) offsets of rows of dz
    # sharing
    row_begin: int
    row_end: int
    panel_begin: int
    panel_end: int
    column_begin: int
    column_end: int
    lockstep: int
    member: int
    members: int
    counter: int


class CellEnd(NamedTuple):
    """What the cell of a block of rows of one panel reads and writes; what is 0 is not written."""

    start: int  # what its sums start from, and from row to row
    start_row: int
    c: int
    c_row: int
    h: int
    h_row: int
    y: int
    y_rows: int  # offsets of its rows
    left: int  # hidden units from this panel on
    gates: int
    gates_row: int
    cells: int


class ProjectionEnd(NamedTuple):
    """Where the projected input of a block of rows of one panel goes."""

    bias: int
    offset: int  # of the panel
    rows: int  # addresses of the rows


class MatrixEnd(NamedTuple):
    """Where rows of a matrix product go: to ``base`` and the row's of ``offsets``."""

    base: int
    offsets: int
    columns: int  # left
    add: int  # to what is there


class TileEnd(NamedTuple):
    """Where a tile of a weight gradient goes."""

    weight: int
    add: int  # to what earlier chunks left there


@inline
def alive_rows(batch_sizes, batch, t):
    """Rows alive at step t."""
    return load_int(batch_sizes + 8 * t) if batch_sizes != 0 else batch


@inline
def row_start(row_starts, batch, t):
    """n of row 0 at step t."""
    return load_int(row_starts + 8 * t) if row_starts != 0 else t * batch


@inline
def user_index(packed, row_starts, batch, t):
    """What a user's tensor is indexed by at step t."""
    return row_start(row_starts, batch, t) if packed != 0 else t


@inline
def walk(reverse, steps, s):
    """The step that is s-th in the direction's order."""
    return steps - 1 - s if reverse != 0 else s


@inline
def block_size(rows, most):
    """Rows of the next block, of blocks as few and as even as can be."""
    return -(-rows // (-(-rows // most)))


@functools.cache
def device_functions(scalar: str, storage: str, block: Block, fast_reciprocal: bool) -> SimpleNamespace:
    """What both kernels share, for computing in ``scalar`` on tensors of ``storage``."""
    ops = simd(scalar, block.lanes, fast_reciprocal)
    key = f"{scalar}_{storage}_{block.lanes}x{block.rows}of{block.registers}{'_fast' if fast_reciprocal else ''}"
    lanes, panel, most, size, stored = block.lanes, block.panel, block.rows, ops.size, SIZE[storage]
    vector_bytes = lanes * size
    store, zeros, add_vectors = ops.store, ops.zeros, ops.add_vectors
    load_storage, store_storage = ops.make_load(storage), ops.make_store(storage)
    load_scalar, store_scalar = ops.make_load(scalar), ops.make_store(scalar)

    @inline
    def clear(address, count):
        """Zeroes ``count`` whole vectors."""
        for i in range(count):
            store(address + i * vector_bytes, zeros())

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
        """Copies a row of ``count`` values into row k of the strips of a weight gradient, each ``rows`` rows long."""
        strips = -(-count // most)
        for j in range(strips):
            begin = count * j // strips
            width = count * (j + 1) // strips - begin
            at = target + (begin * rows + k * width) * size
            for i in range(0, width, lanes):  # once, but where a vector is narrower than a block is high
                if from_storage:
                    value = load_storage(source + (begin + i) * stored, width - i)
                else:
                    value = load_scalar(source + (begin + i) * size, width - i)
                store_scalar(at + i * size, value, width - i)

    def make_matrix(vectors):
        none = ops.make_zeros(vectors)

        def start(row, e):
            return none()

        def finish_matrix(row, sums, e):
            add_vectors(e.base + load_int(e.offsets + 8 * row), sums, e.columns, e.add)

        choices = block.row_choices(vectors)
        rows_block = make_block(ops, choices, vectors, start, finish_matrix, key=key, registers=block.registers)

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

    product_1, product_2, product_4 = (make_matrix(v) for v in (1, 2, 4))

    @inline
    def job(i, first, last, strip):
        """The i-th part of a matrix product: (first panel of k, column panel)."""
        return i // (last - first) * strip, first + i % (last - first)

    @inline
    def packed_at(k, q, panels, columns):
        """Where panel k of column panel q begins in a packed W, in values a row of k."""
        left = columns - q * panel
        return q * panels * panel + k * (lanes if left <= lanes else 2 * lanes if left <= 2 * lanes else panel)

    @inline
    def matrix_product(rows, a, offsets, panels, stride, depth, w, first, last, columns, base, targets, back):
        """Column panels ``first`` to ``last`` of A W for ``rows`` rows; W has ``columns`` columns in all.

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

    return SimpleNamespace(
        ops=ops, key=key, stored=stored, vector_bytes=vector_bytes, load_storage=load_storage,
        store_storage=store_storage,
        clear=clear, widen_row=widen_row, narrow_row=narrow_row, copy_strips=copy_strips, matrix_product=matrix_product,
    )  # fmt: skip


@functools.cache
def forward_kernel(scalar: str, storage: str, block: Block, fast_reciprocal: bool):
    """The compiled forward kernel, for computing in ``scalar`` on tensors of ``storage``."""
    device = device_functions(scalar, storage, block, fast_reciprocal)
    key = device.key
    ops, stored, vector_bytes = device.ops, device.stored, device.vector_bytes
    lanes, size, most = block.lanes, ops.size, block.rows
    gate_bytes = 4 * vector_bytes  # of one row in one panel
    load, store, tanh, activate = ops.load, ops.store, ops.tanh, ops.gates
    load_four, store_vectors = ops.load_four, ops.store_vectors
    store_storage, clear, widen_row = device.store_storage, device.clear, device.widen_row
    narrow_row, matrix_product = device.narrow_row, device.matrix_product
    cell_state, hidden_state = inline(cell.cell_state), inline(cell.hidden_state)

    def start_cell(row, e):
        return load_four(e.start + row * e.start_row)

    def finish_cell(row, sums, e):
        i, f, g, o = activate(sums[0], sums[1], sums[2], sums[3])
        at_c = e.c + row * e.c_row
        c = cell_state(i, f, g, load(at_c))
        h = hidden_state(o, tanh(c))
        store(at_c, c)
        store(e.h + row * e.h_row, h)
        if e.y != 0:
            store_storage(e.y + load_int(e.y_rows + 8 * row), h, e.left)
        if e.gates != 0:
            at = e.gates + row * e.gates_row
            store_storage(at, i, lanes)
            store_storage(at + lanes * stored, f, lanes)
            store_storage(at + 2 * lanes * stored, g, lanes)
            store_storage(at + 3 * lanes * stored, o, lanes)
        if e.cells != 0:
            store(e.cells + row * e.c_row, c)

    def start_bias(row, e):
        return load_four(e.bias)

    def finish_projection(row, sums, e):
        store_vectors(e.offset + load_int(e.rows + 8 * row), sums, 4 * lanes)

    choices = block.row_choices(4)
    cell_block = make_block(ops, choices, 4, start_cell, finish_cell, key=key, registers=block.registers, rolled=True)
    projection_block = make_block(ops, choices, 4, start_bias, finish_projection, key=key, registers=block.registers)

    read = make_read(ForwardArgs)

    @kernel(key)
    def lstm_fwd_kernel(address):
        a = read(address)
        mode = flush_denormals()
        panels = -(-a.hidden // lanes)
        c_row = panels * vector_bytes
        h_row = -(-a.width // lanes) * vector_bytes
        z_row = panels * gate_bytes
        gates_row = panels * 4 * lanes * stored
        projected = a.m != 0
        turn = 0
        # Members may be in different chunks: in scratch, a row keeps its place from step to step, alive or not.
        z_base = a.z if a.z != 0 else a.gates
        x_table = a.table + 16 * a.chunk_rows * a.member
        z_table = x_table + 8 * a.chunk_rows
        stage = a.x_stage + a.member * a.chunk_rows * a.inputs * size
        # The part of a row of h that this member writes, in vectors.
        h_first = 4 * a.column_begin if projected else a.panel_begin
        h_count = (min(4 * a.column_end, -(-a.width // lanes)) if projected else a.panel_end) - h_first

        for s in range(-1, a.steps):
            if s >= 0:
                t = walk(a.reverse, a.steps, s)
                end = min(a.row_end, alive_rows(a.batch_sizes, a.batch, t))
                first_n = row_start(a.row_starts, a.batch, t)
                index = user_index(a.packed, a.row_starts, a.batch, t)

                if s % a.chunk == 0 and a.fused == 0:
                    last = min(s + a.chunk, a.steps)
                    count = 0
                    for later in range(s, last):
                        t_later = walk(a.reverse, a.steps, later)
                        x_here = a.x + user_index(a.packed, a.row_starts, a.batch, t_later) * a.x_step
                        n_later = row_start(a.row_starts, a.batch, t_later)
                        for r in range(a.row_begin, min(a.row_end, alive_rows(a.batch_sizes, a.batch, t_later))):
                            source = x_here + load_int(a.x_rows + 8 * r)
                            if a.x_stage != 0:
                                widen_row(stage + count * a.inputs * size, source, a.inputs)
                                source = stage + count * a.inputs * size
                            store_int(x_table + 8 * count, source)
                            slot = (later - s) * a.batch if a.z != 0 else n_later
                            store_int(z_table + 8 * count, z_base + (slot + r) * z_row)
                            count += 1
                    for p in range(a.panel_begin, a.panel_end):
                        done = 0
                        ahead = a.w_x + min(p + 1, a.panel_end - 1) * a.inputs * gate_bytes
                        while done < count:
                            n = block_size(count - done, most)
                            projection_block(
                                n,
                                (0, x_table + 8 * done, 1, 0, a.inputs, a.w_x + p * a.inputs * gate_bytes, ahead),
                                ProjectionEnd(a.bias + p * gate_bytes, p * gate_bytes, z_table + 8 * done),
                            )
                            done += n
                            ahead += a.inputs * 64

                # Without a projection of their own, sums start from z; else from the bias, whose row stride is 0.
                if a.fused != 0:
                    start, start_row, depth = a.bias, 0, a.inputs
                else:
                    slot = s % a.chunk * a.batch if a.z != 0 else first_n
                    start, start_row, depth = z_base + (slot + a.row_begin) * z_row, z_row, 0
                h_in = a.h + (s & 1) * a.h_half
                h_out = a.h + (1 - (s & 1)) * a.h_half
                h_to, h_to_row = (a.m, c_row) if projected else (h_out, h_row)
                y_here = a.y + index * a.y_step
                # Every other step walks the panels backwards: it begins with the weights that are still near.
                forth = 1 if s & 1 == 0 else -1
                p = a.panel_begin if forth > 0 else a.panel_end - 1
                while a.panel_begin <= p < a.panel_end:
                    unit = p * lanes
                    done = a.row_begin
                    # While a panel is multiplied, the next one is fetched.
                    ahead = a.w_h + min(max(p + forth, a.panel_begin), a.panel_end - 1) * a.width * gate_bytes
                    while done < end:
                        n = block_size(end - done, most)
                        cell_block(
                            n,
                            (
                                a.x + index * a.x_step, a.x_rows + 8 * done, 1, 0, depth,
                                a.w_x + p * a.inputs * gate_bytes, ahead,
                                h_in, a.h_rows + 8 * done, 1, 0, a.width, a.w_h + p * a.width * gate_bytes, ahead,
                            ),
                            CellEnd(
                                start + p * gate_bytes + (done - a.row_begin) * start_row, start_row,
                                a.c + done * c_row + p * vector_bytes, c_row,
                                h_to + done * h_to_row + p * vector_bytes, h_to_row,
                                0 if projected else y_here + unit * stored, a.y_rows + 8 * done, a.hidden - unit,
                                0 if a.gates == 0 else a.gates + (first_n + done) * gates_row + unit * 4 * stored,
                                gates_row, 0 if a.cells == 0 else a.cells + (first_n + done) * c_row + p * vector_bytes,
                            ),
                        )  # fmt: skip
                        done += n
                        ahead += a.width * 64
                    p += forth

                if projected:
                    if a.lockstep != 0:
                        turn += 1
                        arrive_and_wait(a.counter, a.members, turn)
                    matrix_product(
                        end - a.row_begin, a.m, a.m_rows + 8 * a.row_begin, 1, 0, a.hidden, a.w_r,
                        a.column_begin, a.column_end, a.width, h_out, a.h_rows + 8 * a.row_begin, s & 1,
                    )  # fmt: skip
                    for r in range(a.row_begin, end):
                        narrow_row(
                            y_here + load_int(a.y_rows + 8 * r) + h_first * lanes * stored,
                            h_out + r * h_row + h_first * vector_bytes,
                            min(h_count * lanes, a.width - h_first * lanes),
                        )

            # The state that enters the next step: rows that it resets are zeroed by whoever wrote them.
            if a.reset != 0 and s + 1 < a.steps:
                t_next = walk(a.reverse, a.steps, s + 1)
                flags = a.reset + user_index(a.packed, a.row_starts, a.batch, t_next) * a.reset_step
                h_next = a.h + ((s + 1) & 1) * a.h_half
                for r in range(a.row_begin, min(a.row_end, alive_rows(a.batch_sizes, a.batch, t_next))):
                    if load_byte(flags + load_int(a.reset_rows + 8 * r)) != 0:
                        clear(h_next + r * h_row + h_first * vector_bytes, h_count)
                        clear(a.c + r * c_row + a.panel_begin * vector_bytes, a.panel_end - a.panel_begin)
            if a.lockstep != 0:
                turn += 1
                arrive_and_wait(a.counter, a.members, turn)
        set_mode(mode)

    return lstm_fwd_kernel


@functools.cache
def backward_kernel(scalar: str, storage: str, block: Block, fast_reciprocal: bool):
    """The compiled backward kernel, for computing in ``scalar`` on tensors of ``storage``."""
    device = device_functions(scalar, storage, block, fast_reciprocal)
    key = device.key
    ops, stored, vector_bytes = device.ops, device.stored, device.vector_bytes
    lanes, panel, size, most = block.lanes, block.panel, ops.size, block.rows
    gate_bytes = 4 * vector_bytes
    load, store, square_sum = ops.load, ops.store, ops.square_sum
    tanh, load_four = ops.tanh, ops.load_four
    store_vectors, zero_four = ops.store_vectors, ops.zero_four
    load_storage, clear, narrow_row = device.load_storage, device.clear, device.narrow_row
    copy_strips, matrix_product, first_lanes = device.copy_strips, device.matrix_product, ops.first_lanes
    hidden_state, cell_grad = inline(cell.hidden_state), inline(cell.cell_grad)
    gate_grads, cell_grad_prev = inline(cell.gate_grads), inline(cell.cell_grad_prev)

    # Weight gradients: a tile of `n` rows of a gate panel, added to what earlier chunks left.
    def start_tile(row, e):
        return zero_four()

    def finish_tile(row, sums, e):
        at = e.weight + row * gate_bytes
        if e.add != 0:
            before = load_four(at)
            sums = (before[0] + sums[0], before[1] + sums[1], before[2] + sums[2], before[3] + sums[3])
        store_vectors(at, sums, 4 * lanes)

    tile_block = make_block(
        ops, block.row_choices(4), 4, start_tile, finish_tile, key=key, registers=block.registers, by_strip=True
    )

    @inline
    def weight_tile(job, jobs, depth, rows, chunk_rows, columns, weight, strips, add):
        """Tile ``job`` of ``jobs`` of a (depth, panel) gradient: a strip against a panel of dz (or dh)."""
        begin, end = depth * job // jobs, depth * (job + 1) // jobs
        strip = strips + begin * chunk_rows * size
        tile_block(end - begin, (strip, 0, 1, 0, rows, columns, columns), TileEnd(weight + begin * gate_bytes, add))

    read = make_read(BackwardArgs)

    @kernel(key)
    def lstm_bwd_kernel(address):
        a = read(address)
        mode = flush_denormals()
        panels = -(-a.hidden // lanes)
        c_row = panels * vector_bytes
        h_vectors = -(-a.width // lanes)
        h_row = h_vectors * vector_bytes
        gates_row = panels * 4 * lanes * stored
        dz_panel = a.chunk_rows * gate_bytes
        projected = a.dm != 0
        turn = 0
        h_first = 4 * a.column_begin
        h_count = min(4 * a.column_end, h_vectors) - h_first
        norm_row = 8 * -(-max(panels, h_vectors) // NORM_PANELS)
        norms_c = a.norms + a.steps * a.batch * norm_row

        part = a.part_end - a.part_begin
        chunks = -(-a.steps // a.chunk)
        for chunk_index in range(chunks - 1, -1, -1):
            add = 1 if chunk_index < chunks - 1 else 0  # to the weight gradients of the chunks before
            first, last = chunk_index * a.chunk, min((chunk_index + 1) * a.chunk, a.steps)
            earliest = min(walk(a.reverse, a.steps, first), walk(a.reverse, a.steps, last - 1))
            latest = max(walk(a.reverse, a.steps, first), walk(a.reverse, a.steps, last - 1))
            k_base = row_start(a.part_starts, part, earliest)
            count = row_start(a.part_starts, part, latest + 1) - k_base

            for s in range(last - 1, first - 1, -1):
                t = walk(a.reverse, a.steps, s)
                alive = alive_rows(a.batch_sizes, a.batch, t)
                end = min(a.row_end, alive)
                n_here = row_start(a.row_starts, a.batch, t)
                k_here = row_start(a.part_starts, part, t) - k_base - a.part_begin
                index = user_index(a.packed, a.row_starts, a.batch, t)
                flags = a.reset + index * a.reset_step
                t_prev = walk(a.reverse, a.steps, s - 1)
                continued = min(alive, alive_rows(a.batch_sizes, a.batch, t_prev)) if s > 0 else 0
                n_prev = row_start(a.row_starts, a.batch, t_prev) if s > 0 else 0
                dy_here = a.dy + index * a.dy_step
                dy_back = (index - user_index(a.packed, a.row_starts, a.batch, t_prev)) * a.dy_step

                if projected:
                    # dh_t is whole only with the user's part; it is wanted panel by panel for dW_hr.
                    for r in range(a.row_begin, end):
                        squares_h = 0.0
                        for v in range(h_first, h_first + h_count):
                            at = a.dh + r * h_row + v * vector_bytes
                            value = load(at)
                            if a.dy != 0:
                                source = dy_here + load_int(a.dy_rows + 8 * r) + v * lanes * stored
                                value = value + load_storage(source, a.width - v * lanes)
                            if a.norms != 0:
                                squares_h += square_sum(value)
                                if (v + 1) % NORM_PANELS == 0 or v + 1 == h_first + h_count:
                                    store_double(
                                        a.norms + (t * a.batch + r) * norm_row + v // NORM_PANELS * 8, squares_h
                                    )
                                    squares_h = 0.0
                            store(at, value)
                            if a.dw_r != 0:
                                store(
                                    a.dh_chunk + (v // 4 * a.chunk_rows + k_here + r) * gate_bytes
                                    + v % 4 * vector_bytes, value,
                                )  # fmt: skip
                    if a.lockstep != 0:
                        turn += 1
                        arrive_and_wait(a.counter, a.members, turn)
                    matrix_product(
                        end - a.row_begin, a.dh, a.h_rows + 8 * a.row_begin, 1, 0, a.width, a.w_r,
                        -(-a.panel_begin // 4), -(-a.panel_end // 4), a.hidden, a.dm, a.m_rows + 8 * a.row_begin, s & 1,
                    )  # fmt: skip

                for r in range(a.row_begin, end):
                    c_prev_row = a.cells + (n_prev + r) * c_row if r < continued else a.c_0 + r * c_row
                    if a.reset != 0 and load_byte(flags + load_int(a.reset_rows + 8 * r)) != 0:
                        c_prev_row = a.zero
                    dy_row = dy_here + load_int(a.dy_rows + 8 * r) if a.dy != 0 else 0
                    squares_h, squares_c = 0.0, 0.0
                    for p in range(a.panel_begin, a.panel_end):
                        unit, at_vector = p * lanes, p * vector_bytes
                        at = a.gates + (n_here + r) * gates_row + unit * 4 * stored
                        # The step before is fetched now: walking backwards, no prefetcher of the processor's own does,
                        # and at H = 16 reading the gates took longer than the arithmetic.
                        for line in range(0, 4 * lanes * stored, 64):
                            fetch(a.gates + (n_prev + r) * gates_row + unit * 4 * stored + line)
                        if a.dy != 0:
                            fetch(dy_row - dy_back + unit * stored)
                        i, f = load_storage(at, lanes), load_storage(at + lanes * stored, lanes)
                        g, o = (
                            load_storage(at + 2 * lanes * stored, lanes),
                            load_storage(at + 3 * lanes * stored, lanes),
                        )
                        tanh_c = tanh(load(a.cells + (n_here + r) * c_row + at_vector))
                        c_prev = load(c_prev_row + at_vector)
                        if projected:
                            grad_h = load(a.dm + r * c_row + at_vector)
                            if a.dw_r != 0:
                                # dm has served; m_t takes its place until it is copied for dW_hr.
                                store(a.dm + r * c_row + at_vector, hidden_state(o, tanh_c))
                        else:
                            grad_h = load(a.dh + r * c_row + at_vector)
                            if a.dy != 0:
                                grad_h = grad_h + load_storage(dy_row + unit * stored, a.hidden - unit)
                        grad_c = load(a.dc + r * c_row + at_vector)
                        if a.dcells != 0:
                            grad_c = grad_c + load(a.dcells + (n_here + r) * c_row + at_vector)
                        grad_c = cell_grad(grad_c, grad_h, o, tanh_c)
                        dz_i, dz_f, dz_g, dz_o = gate_grads(grad_c, grad_h, i, f, g, o, c_prev, tanh_c)
                        left = a.hidden - unit
                        if left < lanes:  # units beyond H may hold NaN; they must not reach a sum
                            dz_i, dz_f = first_lanes(dz_i, left), first_lanes(dz_f, left)
                            dz_g, dz_o = first_lanes(dz_g, left), first_lanes(dz_o, left)
                            grad_c = first_lanes(grad_c, left)
                            f = first_lanes(f, left)
                        store(a.dc + r * c_row + at_vector, cell_grad_prev(grad_c, f))
                        at = a.dz + p * dz_panel + (k_here + r) * gate_bytes
                        store(at, dz_i)
                        store(at + vector_bytes, dz_f)
                        store(at + 2 * vector_bytes, dz_g)
                        store(at + 3 * vector_bytes, dz_o)
                        if a.norms != 0:
                            squares_h += square_sum(grad_h)
                            squares_c += square_sum(grad_c)
                            if (p + 1) % NORM_PANELS == 0 or p + 1 == a.panel_end:
                                norm = (t * a.batch + r) * norm_row + p // NORM_PANELS * 8
                                if not projected:
                                    store_double(a.norms + norm, squares_h)
                                store_double(norms_c + norm, squares_c)
                                squares_h, squares_c = 0.0, 0.0

                if a.lockstep != 0:
                    turn += 1
                    arrive_and_wait(a.counter, a.members, turn)
                matrix_product(
                    end - a.row_begin, a.dz + (k_here + a.row_begin) * gate_bytes, a.panel_rows, panels, dz_panel,
                    panel, a.w_h, a.column_begin, a.column_end, a.width, a.dh, a.h_rows + 8 * a.row_begin, s & 1,
                )  # fmt: skip
                if projected and a.dw_r != 0 and a.panel_begin == 0:
                    for r in range(a.row_begin, end):
                        copy_strips(a.m_strips, a.dm + r * c_row, a.hidden, k_here + r, a.chunk_rows, False)
                if a.reset != 0:
                    for r in range(a.row_begin, end):
                        if load_byte(flags + load_int(a.reset_rows + 8 * r)) != 0:
                            clear(a.dh + r * h_row + h_first * vector_bytes, h_count)
                            clear(a.dc + r * c_row + a.panel_begin * vector_bytes, a.panel_end - a.panel_begin)

            # The rows of the chunk: copies of x and h_{t-1} for the weight gradients, and where dx goes.
            for s in range(first + a.member, last, a.members):
                t = walk(a.reverse, a.steps, s)
                alive = alive_rows(a.batch_sizes, a.batch, t)
                k_here = row_start(a.part_starts, part, t) - k_base - a.part_begin
                index = user_index(a.packed, a.row_starts, a.batch, t)
                t_prev = walk(a.reverse, a.steps, s - 1)
                continued = min(alive, alive_rows(a.batch_sizes, a.batch, t_prev)) if s > 0 else 0
                y_prev = a.y + user_index(a.packed, a.row_starts, a.batch, t_prev) * a.y_step
                for r in range(a.part_begin, min(a.part_end, alive)):
                    k = k_here + r
                    if a.dx_stage != 0:
                        store_int(a.table + 8 * k, a.dx_stage + k * a.inputs * size)
                    else:
                        store_int(a.table + 8 * k, a.dx + index * a.dx_step + load_int(a.dx_rows + 8 * r))
                    if a.dw_x != 0:
                        x_row = a.x + index * a.x_step + load_int(a.x_rows + 8 * r)
                        copy_strips(a.x_strips, x_row, a.inputs, k, a.chunk_rows, True)
                        if (
                            a.reset != 0
                            and load_byte(a.reset + index * a.reset_step + load_int(a.reset_rows + 8 * r)) != 0
                        ):
                            copy_strips(a.h_strips, a.zero, a.width, k, a.chunk_rows, False)
                        elif r < continued:
                            copy_strips(a.h_strips, y_prev + load_int(a.y_rows + 8 * r), a.width, k, a.chunk_rows, True)
                        else:
                            copy_strips(a.h_strips, a.h_0 + r * h_row, a.width, k, a.chunk_rows, False)
            turn += 1
            arrive_and_wait(a.counter, a.members, turn)

            if a.dw_x != 0:
                tiles_x, tiles_h = -(-a.inputs // most), -(-a.width // most)
                jobs = tiles_x + tiles_h + 1
                for job in range(panels * jobs * a.member // a.members, panels * jobs * (a.member + 1) // a.members):
                    p, j = job // jobs, job % jobs
                    columns = a.dz + p * dz_panel
                    if j < tiles_x:
                        weight_tile(
                            j, tiles_x, a.inputs, count, a.chunk_rows, columns,
                            a.dw_x + p * a.inputs * gate_bytes, a.x_strips, add,
                        )  # fmt: skip
                    elif j < tiles_x + tiles_h:
                        weight_tile(
                            j - tiles_x, tiles_h, a.width, count, a.chunk_rows, columns,
                            a.dw_h + p * a.width * gate_bytes, a.h_strips, add,
                        )  # fmt: skip
                    else:
                        i, f, g, o = zero_four()
                        for k in range(count):
                            row = load_four(columns + k * gate_bytes)
                            i, f, g, o = i + row[0], f + row[1], g + row[2], o + row[3]
                        at = a.db + p * gate_bytes
                        if add != 0:
                            row = load_four(at)
                            i, f, g, o = i + row[0], f + row[1], g + row[2], o + row[3]
                        store_vectors(at, (i, f, g, o), 4 * lanes)
                if projected:
                    tiles = -(-a.hidden // most)
                    columns_panels = -(-a.width // panel)
                    for job in range(
                        columns_panels * tiles * a.member // a.members,
                        columns_panels * tiles * (a.member + 1) // a.members,
                    ):
                        q, j = job // tiles, job % tiles
                        columns = a.dh_chunk + q * a.chunk_rows * gate_bytes
                        weight_tile(
                            j, tiles, a.hidden, count, a.chunk_rows, columns,
                            a.dw_r + q * a.hidden * gate_bytes, a.m_strips, add,
                        )  # fmt: skip
            if a.dx != 0:
                begin, end = count * a.member // a.members, count * (a.member + 1) // a.members
                done = begin
                while done < end:
                    n = min(JOINED_ROWS, end - done)
                    matrix_product(
                        n, a.dz + done * gate_bytes, a.panel_rows, panels, dz_panel, panel, a.w_x,
                        0, -(-a.inputs // panel), a.inputs, 0, a.table + 8 * done, 0,
                    )  # fmt: skip
                    done += n
                if a.dx_stage != 0:
                    for s in range(first, last):
                        t = walk(a.reverse, a.steps, s)
                        k_here = row_start(a.part_starts, part, t) - k_base
                        k_next = row_start(a.part_starts, part, t + 1) - k_base
                        dx_here = a.dx + user_index(a.packed, a.row_starts, a.batch, t) * a.dx_step
                        for k in range(max(begin, k_here), min(end, k_next)):
                            target = dx_here + load_int(a.dx_rows + 8 * (a.part_begin + k - k_here))
                            narrow_row(target, a.dx_stage + k * a.inputs * size, a.inputs)
            turn += 1
            arrive_and_wait(a.counter, a.members, turn)
        set_mode(mode)

    return lstm_bwd_kernel
