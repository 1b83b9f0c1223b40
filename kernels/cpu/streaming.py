"""The kernel of a stream: some steps of all layers in one call, with weights packed once and a state that stays.

It computes what ``forward.py`` computes, with the same blocks and sums in the same order, so the bits are those of one
long run.  What differs is what a single step pays for: no job packs weights or reads states; a panel holds W_ih and
W_hh one behind the other, so that a block reads one stream of memory; and the input is never projected ahead.

L layers, T steps of a call, B batch, I input of a layer, H hidden, P what the recurrence carries (the projection, or
H), U panels of ``lanes`` hidden units, H' = U * lanes, P' likewise.  All addresses, strides and offsets are in bytes.

A call begins and ends with h_t in the first half of ``h``; in between its steps alternate between the halves.  All
layers take a band of steps one after the other: their outputs in between have room for that many.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba.core import types

from .copying import row_functions
from .forward import CellEnd, make_cell_block
from .jit import inline, kernel
from .matmul import Left, Right, make_matrix_product
from .memory import load_byte, load_int, make_read, store_int
from .mode import flush_denormals, set_mode
from .steps import block_size
from .sync import meet
from .tiles import tile_state
from .variant import Variant, row_sizes

# As NEAR of microkernel.py.  One row at H = I = 512, whose weights come from the third-level cache: 96 microseconds at
# 256 and 512 bytes, 121 to 126 at 768 and 1024, 113 to 120 beyond; from the second-level cache all are equal.  (An AMD
# EPYC with AVX-512, one thread.)
NEAR = 512


class StreamLayer(NamedTuple):
    """A layer of a stream (see ``arguments.py``)."""

    w: int  # gate panels of (W_ih, W_hh), k over I and then P
    bias: int  # (U, 4, lanes)
    w_r: int  # column panels of W_hr^T; 0 without a projection
    h: int  # (2, B, P') operands
    c: int  # (B, H')
    inputs: int


class StreamArgs(NamedTuple):
    """Arguments of one member (see ``arguments.py``)."""

    layers: int  # StreamLayer of each
    layer_count: int
    turns: int  # int64, this member's: odd if its next step takes the panels in reverse
    # tensors of the call
    x: int
    x_step: int
    x_rows: int  # (B,) int64 offsets
    y: int
    y_step: int
    y_rows: int
    reset: int  # bytes; 0: none
    reset_step: int
    reset_rows: int
    # scratch
    between: int  # (2, band, B, P): outputs of one layer that the next one reads, in the caller's dtype
    between_half: int
    between_step: int
    between_rows: int
    x_stage: int  # (B, most of I and P), this member's: rows of operands; 0: those of x are
    stage_rows: int
    o: int  # (rows of a block, lanes), this member's: the output gate of the rows of a block
    m: int  # (B, H') operands: o tanh(c), before the projection; 0 without one
    m_rows: int
    sums: int  # (B, P'): h in the compute dtype, as a projection adds it up, where operands are pairs
    sums_rows: int
    # sizes
    steps: int
    band: int
    hidden: int
    width: int  # P
    h_half: int
    h_rows: int
    # partition
    row_begin: int
    row_end: int
    panel_begin: int
    panel_end: int
    column_begin: int  # column panels of P
    column_end: int
    lockstep: int  # panels are divided among members: one barrier per step
    member: int
    members: int
    counter: int


class Tensors(NamedTuple):
    """The addresses that differ between calls of one shape."""

    x: int
    reset: int  # bytes; 0: none


class Stage(NamedTuple):
    """A layer at a step: where it reads and writes."""

    x: int
    x_rows: int
    y: int
    y_rows: int
    h_in: int
    h_out: int
    back: int  # panels in reverse


class Widths(NamedTuple):
    """Derived from a member's arguments: depths of products in terms, bytes per row, and its range of a row of h in
    vectors."""

    h_terms: int
    m_terms: int
    c_row: int
    h_row: int
    m_row: int
    h_first: int
    h_count: int


def _make_compute_panels(variant: Variant) -> Any:
    """A step of one layer, of a member's rows and panels."""
    lanes, stored, most = variant.block.lanes, variant.stored, variant.block.rows
    vector_bytes, gate_bytes, operand_bytes = variant.vector_bytes, variant.gate_bytes, lanes * variant.operand_size
    cell_block, (terms, _) = make_cell_block(variant, NEAR), row_sizes(variant)

    @inline
    def compute_panel(a, w, layer, at, p, ahead):
        """Panel p; ``ahead``: the weights that are needed next."""
        inputs = terms(layer.inputs)
        panel = layer.w + p * (inputs + w.h_terms) * gate_bytes
        h_to, h_row = (a.m, w.m_row) if a.m != 0 else (at.h_out, w.h_row)
        y = 0 if a.m != 0 else at.y + p * lanes * stored
        done = a.row_begin
        while done < a.row_end:
            n = block_size(a.row_end - done, most)
            cell_block(
                n,
                (
                    at.x, at.x_rows + 8 * done, 1, 0, inputs, panel, ahead,
                    at.h_in, a.h_rows + 8 * done, 1, 0, w.h_terms, panel + inputs * gate_bytes, ahead + inputs * 64,
                ),
                CellEnd(
                    layer.bias + p * gate_bytes, 0, layer.c + done * w.c_row + p * vector_bytes, w.c_row,
                    h_to + done * h_row + p * operand_bytes, h_row, a.o, y, at.y_rows + 8 * done, a.hidden - p * lanes,
                    0, 0, 0,
                ),
            )  # fmt: skip
            done += n
            ahead += (inputs + w.h_terms) * 64

    @inline
    def compute_panels(a, w, layer, at):
        # Every other step takes the panels in reverse: it begins with the weights that are still in the cache.
        forth = 1 if at.back == 0 else -1
        p = a.panel_begin if forth > 0 else a.panel_end - 1
        while a.panel_begin <= p < a.panel_end:
            following = min(max(p + forth, a.panel_begin), a.panel_end - 1)
            compute_panel(a, w, layer, at, p, layer.w + following * (terms(layer.inputs) + w.h_terms) * gate_bytes)
            p += forth

    return compute_panels


def _make_around_step(variant: Variant) -> Any:
    """(stage_input, project_hidden, reset_rows, keep_state): what a step needs in addition to its panels."""
    rows, matrix_product = row_functions(variant), make_matrix_product(variant)
    clear, operand_row, narrow_row = rows.clear, rows.operand_row, rows.narrow_row
    clear_operand, copy_operand, narrow_operand = rows.clear_operand, rows.copy_operand, rows.narrow_operand
    lanes, stored, vector_bytes = variant.block.lanes, variant.stored, variant.vector_bytes
    operand_bytes, paired = lanes * variant.operand_size, variant.products.paired

    @inline
    def stage_input(a, layer, at):
        """Copies the member's rows of x into rows of operands."""
        for r in range(a.row_begin, a.row_end):
            operand_row(a.x_stage + load_int(a.stage_rows + 8 * r), at.x + load_int(at.x_rows + 8 * r), layer.inputs)
        return Stage(a.x_stage, a.stage_rows, at.y, at.y_rows, at.h_in, at.h_out, at.back)

    @inline
    def project_hidden(a, w, layer, at):
        """h = W_hr m, and y."""
        sums, sums_rows = (a.sums, a.sums_rows) if paired else (at.h_out, a.h_rows)
        matrix_product(
            a.row_end - a.row_begin,
            Left(a.m, a.m_rows + 8 * a.row_begin, 1, 0, w.m_terms),
            Right(layer.w_r, a.column_begin, a.column_end, a.width, at.back),
            sums,
            sums_rows + 8 * a.row_begin,
        )
        count = min(w.h_count * lanes, a.width - w.h_first * lanes)
        for r in range(a.row_begin, a.row_end):
            source = sums + load_int(sums_rows + 8 * r) + w.h_first * vector_bytes
            if paired:
                narrow_operand(at.h_out + r * w.h_row + w.h_first * operand_bytes, source, count)
            narrow_row(at.y + load_int(at.y_rows + 8 * r) + w.h_first * lanes * stored, source, count)

    @inline
    def reset_rows(a, w, layer, reset, t):
        """Prepares the state that enters step t: each member zeroes the reset rows that it wrote itself."""
        h = layer.h + (t & 1) * a.h_half
        for r in range(a.row_begin, a.row_end):
            if load_byte(reset + t * a.reset_step + load_int(a.reset_rows + 8 * r)) != 0:
                clear_operand(h + r * w.h_row + w.h_first * operand_bytes, w.h_count)
                clear(layer.c + r * w.c_row + a.panel_begin * vector_bytes, a.panel_end - a.panel_begin)

    @inline
    def keep_state(a, w, layer):
        """After an odd number of steps: h_t into the first half, from where the next call reads it."""
        for r in range(a.row_begin, a.row_end):
            at = layer.h + r * w.h_row + w.h_first * operand_bytes
            copy_operand(at, at + a.h_half, w.h_count)

    return stage_input, project_hidden, reset_rows, keep_state


def _make_run(variant: Variant) -> Any:
    """All steps of a call, for one member."""
    lanes, vector_bytes, layer_bytes = variant.block.lanes, variant.vector_bytes, 8 * len(StreamLayer._fields)
    compute_panels, read_layer = _make_compute_panels(variant), make_read(StreamLayer)
    terms, operand_row_bytes = row_sizes(variant)
    stage_input, project_hidden, reset_rows, keep_state = _make_around_step(variant)

    @inline
    def widths_of(a):
        h_vectors = -(-a.width // lanes)
        # The range of a row of h that this member writes: its panels, or its columns of a projection.
        first = 4 * a.column_begin if a.m != 0 else a.panel_begin
        end = min(4 * a.column_end, h_vectors) if a.m != 0 else a.panel_end
        return Widths(
            terms(a.width), terms(a.hidden), -(-a.hidden // lanes) * vector_bytes, operand_row_bytes(a.width),
            operand_row_bytes(a.hidden), first, end - first,
        )  # fmt: skip

    @inline
    def stage_of(a, layer, x_first, index, t, back):
        x, x_rows = x_first + t * a.x_step, a.x_rows
        y, y_rows = a.y + t * a.y_step, a.y_rows
        room = a.between + t % a.band * a.between_step
        if index > 0:
            x, x_rows = room + (index - 1) % 2 * a.between_half, a.between_rows
        if index < a.layer_count - 1:
            y, y_rows = room + index % 2 * a.between_half, a.between_rows
        half = t & 1
        return Stage(x, x_rows, y, y_rows, layer.h + half * a.h_half, layer.h + (1 - half) * a.h_half, back)

    @inline
    def run_layer(a, w, tensors, index, begin, turn, passed):
        """A band of steps from ``begin`` on of one layer; returns the barriers passed so far."""
        layer, end = read_layer(a.layers + index * layer_bytes), min(begin + a.band, a.steps)
        if tensors.reset != 0:
            reset_rows(a, w, layer, tensors.reset, begin)
            if a.lockstep != 0:
                passed = meet(a, passed)
        for t in range(begin, end):
            at = stage_of(a, layer, tensors.x, index, t, (t + turn) & 1)
            if a.x_stage != 0:
                at = stage_input(a, layer, at)
            compute_panels(a, w, layer, at)
            if a.m != 0:
                if a.lockstep != 0:
                    passed = meet(a, passed)
                project_hidden(a, w, layer, at)
            if tensors.reset != 0 and t + 1 < end:
                reset_rows(a, w, layer, tensors.reset, t + 1)
            if a.lockstep != 0:
                passed = meet(a, passed)
        return passed

    @inline
    def run(a, tensors):
        w, passed, turn = widths_of(a), 0, load_int(a.turns)
        for begin in range(0, a.steps, a.band):
            for index in range(a.layer_count):
                passed = run_layer(a, w, tensors, index, begin, turn, passed)
        if a.steps & 1:
            for index in range(a.layer_count):
                keep_state(a, w, read_layer(a.layers + index * layer_bytes))
            store_int(a.turns, turn + 1)

    return run


STEP = types.void(types.int64, types.int64, types.int64)  # (arguments, x, reset)


@functools.cache
def stream_kernel(variant: Variant) -> Any:
    """The compiled kernel for one thread, called with the addresses of its arguments, of x and of reset (0: none)."""
    run, read = _make_run(variant), make_read(StreamArgs)
    shape_tiles, release_tiles = tile_state(variant)

    @kernel(variant.key, STEP)
    def lstm_stream_kernel(address, x, reset):
        mode = flush_denormals()
        a = read(address)
        shape_tiles(a.row_end - a.row_begin)
        run(a, Tensors(x, reset))
        release_tiles()
        set_mode(mode)

    return lstm_stream_kernel


@functools.cache
def shared_stream_kernel(variant: Variant) -> Any:
    """The compiled kernel that each thread of a launch runs; x and reset are in the arguments."""
    run, read = _make_run(variant), make_read(StreamArgs)
    shape_tiles, release_tiles = tile_state(variant)

    @kernel(variant.key)
    def lstm_shared_stream_kernel(address):
        mode = flush_denormals()
        a = read(address)
        shape_tiles(a.row_end - a.row_begin)
        run(a, Tensors(a.x, a.reset))
        release_tiles()
        set_mode(mode)

    return lstm_shared_stream_kernel
