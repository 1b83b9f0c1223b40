"""The forward kernel, which each thread of a launch runs; the package's docstring has sizes, memory and partition."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .. import cell
from .arguments import ForwardArgs
from .copying import row_functions
from .jit import inline, kernel
from .matmul import Left, Right, make_matrix_product
from .memory import load_int, make_read, store_int
from .microkernel import NEAR, Around, make_block
from .mode import flush_denormals, set_mode
from .pipeline import BUFFER, make_pipelined_block
from .simd import simd
from .steps import active_rows, block_size, resets, row_start, user_index, walk
from .sync import end_turn, meet, my_turn
from .tiles import tile_state
from .variant import Variant, row_sizes
from .vector import joining


class CellEnd(NamedTuple):
    """Operands and results of the cell for a block of rows of one panel; an address of 0 is not written."""

    start: int  # initial values of the sums, and bytes per row
    start_row: int
    c: int
    c_row: int
    h: int
    h_row: int
    o: int  # (rows, lanes): scratch
    y: int
    y_rows: int  # offsets of its rows
    left: int  # hidden units from this panel on
    gates: int
    gates_row: int
    cells: int


class ProjectionEnd(NamedTuple):
    """Destination of the projected input of a block of tokens of one panel."""

    bias: int
    offset: int  # of the panel
    rows: int  # addresses of the tokens' rows of z


class Widths(NamedTuple):
    """Derived from a member's arguments: depths of products in terms, bytes per row, and its range of a row of h in
    vectors."""

    x_terms: int
    h_terms: int
    m_terms: int
    x_row: int
    c_row: int
    h_row: int
    m_row: int
    z_row: int
    gates_row: int
    z_base: int
    h_first: int
    h_count: int


class Step(NamedTuple):
    """A step, for one member."""

    s: int  # in the direction's order
    end: int  # end of the member's active rows
    n: int  # of row 0
    position: int  # in the user's tensors
    h_in: int
    h_out: int


def _make_finish_hidden(variant: Variant) -> Any:
    """h of all rows of a block, from c and o: two rows at a time, because a tanh is one long dependency chain."""
    ops, pairs = variant.ops, simd(variant.scalar, 2 * variant.block.lanes, variant.fast_reciprocal)
    load, tanh, store_storage, store_operand = (
        ops.load, ops.tanh, ops.make_store(variant.storage), ops.make_store(variant.operand)
    )  # fmt: skip
    tanh_pair, join_pair, split_pair = pairs.tanh, *joining(ops.vector, 2)
    hidden_state, lanes, vector_bytes = inline(cell.hidden_state), variant.block.lanes, variant.vector_bytes
    paired = variant.products.paired  # units beyond H, which may be NaN, must not enter a product: they stay zero

    @inline
    def write(row, e, tanh_c):
        h = hidden_state(load(e.o + row * vector_bytes), tanh_c)
        store_operand(e.h + row * e.h_row, h, e.left if paired else lanes)
        if e.y != 0:
            store_storage(e.y + load_int(e.y_rows + 8 * row), h, e.left)

    def finish_hidden(rows, e):
        for row in range(0, rows - 1, 2):
            at = e.c + row * e.c_row
            tanh_c = split_pair(tanh_pair(join_pair((load(at), load(at + e.c_row)))))
            write(row, e, tanh_c[0])
            write(row + 1, e, tanh_c[1])
        if rows % 2 != 0:
            write(rows - 1, e, tanh(load(e.c + (rows - 1) * e.c_row)))

    return finish_hidden


def _around_cell(variant: Variant) -> Around:
    """The cell, which follows the products."""
    ops, lanes, stored = variant.ops, variant.block.lanes, variant.stored
    load, store, activate, vector_bytes = ops.load, ops.store, ops.gates, variant.vector_bytes
    store_storage, cell_state = ops.make_store(variant.storage), inline(cell.cell_state)

    def begin_cell(e):
        return e.start, e.start_row

    def finish_cell(row, sums, e):
        i, f, g, o = activate(sums[0], sums[1], sums[2], sums[3])
        at_c = e.c + row * e.c_row
        c = cell_state(i, f, g, load(at_c))
        store(at_c, c)
        store(e.o + row * vector_bytes, o)  # kept here until all rows of the block have their c
        if e.gates != 0:
            at = e.gates + row * e.gates_row
            store_storage(at, i, lanes)
            store_storage(at + lanes * stored, f, lanes)
            store_storage(at + 2 * lanes * stored, g, lanes)
            store_storage(at + 3 * lanes * stored, o, lanes)
        if e.cells != 0:
            store(e.cells + row * e.c_row, c)

    return Around(finish_cell, begin_cell, _make_finish_hidden(variant), rolled=True)


def make_cell_block(variant: Variant, near: int = NEAR) -> Any:
    """The recurrent product of some rows with one panel, and the cell; ``near``: see ``microkernel.NEAR``."""
    return make_block(variant, 4, _around_cell(variant), name=f"near{near}", near=near)


def _make_begin_chunk(variant: Variant) -> Any:
    """(stage_chunk, project_chunk): of a chunk of steps before these steps, its rows of x, or their projection."""
    block, gate_bytes, store_vectors = variant.block, variant.gate_bytes, variant.ops.store_vectors
    width, most = 4 * block.lanes, block.rows
    operand_row = row_functions(variant).operand_row
    shape_tiles, _ = tile_state(variant)

    def begin_bias(e):
        return e.bias, 0

    def finish_projection(row, sums, e):
        store_vectors(e.offset + load_int(e.rows + 8 * row), sums, width)

    projection_block = make_block(variant, 4, Around(finish_projection, begin_bias))

    @inline
    def list_rows(a, w, s, x_table, z_table):
        """Lists the addresses of x and z of the member's tokens in the chunk from step ``s`` on; their number."""
        stage = a.x_stage + a.member * a.chunk_tokens * w.x_row
        count = 0
        for later in range(s, min(s + a.chunk, a.last)):
            t = walk(a.reverse, a.steps, later)
            x_here = a.x + user_index(a.packed, a.row_starts, a.batch, t) * a.x_step
            # Members may be in different chunks: in scratch every row has the same place at each step, active or not.
            slot = (later - s) * a.batch if a.z != 0 else row_start(a.row_starts, a.batch, t)
            for r in range(a.row_begin, min(a.row_end, active_rows(a.batch_sizes, a.batch, t))):
                source = x_here + load_int(a.x_rows + 8 * r)
                if a.x_stage != 0:
                    operand_row(stage + count * w.x_row, source, a.inputs)
                    source = stage + count * w.x_row
                store_int(x_table + 8 * count, source)
                store_int(z_table + 8 * count, w.z_base + (slot + r) * w.z_row)
                count += 1
        return count

    @inline
    def stage_chunk(a, w, s):
        """Copies the rows of x of a chunk, from step ``s`` on, into rows of operands, a place for each step."""
        stage = a.x_stage + a.member * a.chunk_tokens * w.x_row
        for later in range(s, min(s + a.chunk, a.last)):
            t = walk(a.reverse, a.steps, later)
            x_here = a.x + user_index(a.packed, a.row_starts, a.batch, t) * a.x_step
            target = stage + ((later - s) * (a.row_end - a.row_begin) - a.row_begin) * w.x_row
            for r in range(a.row_begin, min(a.row_end, active_rows(a.batch_sizes, a.batch, t))):
                operand_row(target + r * w.x_row, x_here + load_int(a.x_rows + 8 * r), a.inputs)

    @inline
    def project_chunk(a, w, s):
        x_table = a.table + 16 * a.chunk_tokens * a.member
        z_table = x_table + 8 * a.chunk_tokens
        count = list_rows(a, w, s, x_table, z_table)
        shape_tiles(count)
        for p in range(a.panel_begin, a.panel_end):
            done = 0
            ahead = a.w_x + min(p + 1, a.panel_end - 1) * w.x_terms * gate_bytes
            while done < count:
                n = block_size(count - done, most)
                projection_block(
                    n,
                    (0, x_table + 8 * done, 1, 0, w.x_terms, a.w_x + p * w.x_terms * gate_bytes, ahead),
                    ProjectionEnd(a.bias + p * gate_bytes, p * gate_bytes, z_table + 8 * done),
                )
                done += n
                ahead += w.x_terms * 64
        shape_tiles(a.row_end - a.row_begin)

    return stage_chunk, project_chunk


def _make_compute_panels(variant: Variant) -> Any:
    """A step of a member's rows and panels."""
    return _make_panels_pipelined(variant) if variant.products.tiled else _make_panels_by_turns(variant)


@inline
def _panel_of(a, step, i):
    """The i-th panel: every other step takes them in reverse, to begin with weights that are still in the cache."""
    return a.panel_begin + i if step.s & 1 == 0 else a.panel_end - 1 - i


def _make_panels_by_turns(variant: Variant) -> Any:
    """A block's cell follows its products."""
    most, gate_bytes, cell_block = variant.block.rows, variant.gate_bytes, make_cell_block(variant)
    product_of, end_of = _make_operands(variant)

    @inline
    def compute_panels(a, w, step):
        for i in range(a.panel_end - a.panel_begin):
            p = _panel_of(a, step, i)
            # While a panel is multiplied, the next one is prefetched.
            following = _panel_of(a, step, min(i + 1, a.panel_end - a.panel_begin - 1))
            ahead, done = a.w_h + following * w.h_terms * gate_bytes, a.row_begin
            while done < step.end:
                n = block_size(step.end - done, most)
                cell_block(n, product_of(a, w, step, p, done, ahead), end_of(a, w, step, p, done))
                done += n
                ahead += w.h_terms * 64

    return compute_panels


def _make_panels_pipelined(variant: Variant) -> Any:
    """A block's cell runs while the next block is multiplied."""
    most, vector_bytes = variant.block.rows, variant.vector_bytes
    pipelined_block = make_pipelined_block(variant, _around_cell(variant))
    product_of, end_of = _make_operands(variant)

    @inline
    def compute_panels(a, w, step):
        buffer = a.o + a.members * most * vector_bytes + a.member * BUFFER
        rows, end = 0, end_of(a, w, step, a.panel_begin, a.row_begin)
        for i in range(a.panel_end - a.panel_begin):
            p, done = _panel_of(a, step, i), a.row_begin
            while done < step.end:
                n = block_size(step.end - done, most)
                following = end_of(a, w, step, p, done)
                pipelined_block(rows, end, n, product_of(a, w, step, p, done, 0), following, buffer)
                rows, end = n, following
                done += n
        if rows > 0:
            pipelined_block(rows, end, 0, product_of(a, w, step, a.panel_begin, a.row_begin, 0), end, buffer)

    return compute_panels


def _make_operands(variant: Variant) -> Any:
    """(product_of, end_of): of a block of the rows from ``done`` on and a panel, its products and what follows them."""
    lanes, stored, most = variant.block.lanes, variant.stored, variant.block.rows
    vector_bytes, gate_bytes, operand_bytes = variant.vector_bytes, variant.gate_bytes, lanes * variant.operand_size

    @inline
    def product_of(a, w, step, p, done, ahead):
        """``ahead``: the weights that are needed next."""
        x, x_rows = a.x + step.position * a.x_step, a.x_rows
        if a.x_stage != 0:
            slot = (step.s - a.first) % a.chunk * (a.row_end - a.row_begin) - a.row_begin
            x, x_rows = a.x_stage + (a.member * a.chunk_tokens + slot) * w.x_row, a.stage_rows
        return (
            x, x_rows + 8 * done, 1, 0, w.x_terms if a.fused != 0 else 0, a.w_x + p * w.x_terms * gate_bytes, ahead,
            step.h_in, a.h_rows + 8 * done, 1, 0, w.h_terms, a.w_h + p * w.h_terms * gate_bytes, ahead,
        )  # fmt: skip

    @inline
    def end_of(a, w, step, p, done):
        # Fused, the sums start from the bias, whose row stride is 0; else from z.
        start, start_row = a.bias, 0
        if a.fused == 0:
            slot = (step.s - a.first) % a.chunk * a.batch if a.z != 0 else step.n
            start, start_row = w.z_base + (slot + done) * w.z_row, w.z_row
        h_to, h_to_row = (a.m, w.m_row) if a.m != 0 else (step.h_out, w.h_row)
        return CellEnd(
            start + p * gate_bytes, start_row,
            a.c + done * w.c_row + p * vector_bytes, w.c_row,
            h_to + done * h_to_row + p * operand_bytes, h_to_row, a.o + a.member * most * vector_bytes,
            0 if a.m != 0 or a.y == 0 else a.y + step.position * a.y_step + p * lanes * stored, a.y_rows + 8 * done,
            a.hidden - p * lanes,
            0 if a.gates == 0 else a.gates + (step.n + done) * w.gates_row + p * lanes * 4 * stored, w.gates_row,
            0 if a.cells == 0 else a.cells + (step.n + done) * w.c_row + p * vector_bytes,
        )  # fmt: skip

    return product_of, end_of


def _make_finish_step(variant: Variant) -> Any:
    """(project_hidden, clear_padding, reset_rows): what follows a step."""
    rows, matrix_product = row_functions(variant), make_matrix_product(variant)
    clear, clear_stored, narrow_row = rows.clear, rows.clear_stored, rows.narrow_row
    narrow_operand, clear_operand = rows.narrow_operand, rows.clear_operand
    lanes, stored, vector_bytes = variant.block.lanes, variant.stored, variant.vector_bytes
    operand_bytes, paired = lanes * variant.operand_size, variant.products.paired

    @inline
    def project_hidden(a, w, step):
        """h = W_hr m, and y."""
        sums, sums_rows = (a.sums, a.sums_rows) if paired else (step.h_out, a.h_rows)
        matrix_product(
            step.end - a.row_begin,
            Left(a.m, a.m_rows + 8 * a.row_begin, 1, 0, w.m_terms),
            Right(a.w_r, a.column_begin, a.column_end, a.width, step.s & 1),
            sums,
            sums_rows + 8 * a.row_begin,
        )
        count = min(w.h_count * lanes, a.width - w.h_first * lanes)
        for r in range(a.row_begin, step.end):
            source = sums + load_int(sums_rows + 8 * r) + w.h_first * vector_bytes
            if paired:
                narrow_operand(step.h_out + r * w.h_row + w.h_first * operand_bytes, source, count)
            if a.y != 0:
                y = a.y + step.position * a.y_step + load_int(a.y_rows + 8 * r)
                narrow_row(y + w.h_first * lanes * stored, source, count)

    @inline
    def clear_padding(a, w, step):
        """Zeroes the output of rows without step t; each member does so for the columns that it writes."""
        y = a.y + step.position * a.y_step + w.h_first * lanes * stored
        for r in range(max(step.end, a.row_begin), a.row_end):
            clear_stored(y + load_int(a.y_rows + 8 * r), min(w.h_count * lanes, a.width - w.h_first * lanes))

    @inline
    def reset_rows(a, w, s):
        """Prepares the state that enters step ``s``: each member zeroes the reset rows that it wrote itself."""
        t = walk(a.reverse, a.steps, s)
        index = user_index(a.packed, a.row_starts, a.batch, t)
        h = a.h + (s & 1) * a.h_half
        for r in range(a.row_begin, min(a.row_end, active_rows(a.batch_sizes, a.batch, t))):
            if resets(a, index, r):
                clear_operand(h + r * w.h_row + w.h_first * operand_bytes, w.h_count)
                clear(a.c + r * w.c_row + a.panel_begin * vector_bytes, a.panel_end - a.panel_begin)

    return project_hidden, clear_padding, reset_rows


def _make_borders(variant: Variant) -> Any:
    """(keep_border, enter): the states between segments of steps; each member has the ranges that it writes itself."""
    rows, vector_bytes, operand_bytes = (
        row_functions(variant), variant.vector_bytes, variant.block.lanes * variant.operand_size
    )  # fmt: skip
    copy, copy_operand = rows.copy, rows.copy_operand

    @inline
    def keep_border(a, w, s):
        """Writes the state that enters step ``s``, the first of a segment."""
        h, at_h, at_c = a.h + (s & 1) * a.h_half, w.h_first * operand_bytes, a.panel_begin * vector_bytes
        for r in range(a.row_begin, a.row_end):
            row = s // a.segment * a.batch + r
            copy_operand(a.borders_h + row * w.h_row + at_h, h + r * w.h_row + at_h, w.h_count)
            copy(a.borders_c + row * w.c_row + at_c, a.c + r * w.c_row + at_c, a.panel_end - a.panel_begin)

    @inline
    def enter(a, w):
        """Starts from the border at step ``first``.  Its c also goes where backward looks for that of the step before;
        its h into both halves, as h_0 does."""
        t_prev = walk(a.reverse, a.steps, a.first - 1)
        active = active_rows(a.batch_sizes, a.batch, t_prev) if a.first > 0 else 0
        n_prev = row_start(a.row_starts, a.batch, t_prev) if a.first > 0 else 0
        at_h, at_c, panels = w.h_first * operand_bytes, a.panel_begin * vector_bytes, a.panel_end - a.panel_begin
        for r in range(a.row_begin, a.row_end):
            row = a.first // a.segment * a.batch + r
            from_c = a.borders_c + row * w.c_row + at_c
            copy_operand(a.h + r * w.h_row + at_h, a.borders_h + row * w.h_row + at_h, w.h_count)
            copy_operand(a.h + a.h_half + r * w.h_row + at_h, a.borders_h + row * w.h_row + at_h, w.h_count)
            copy(a.c + r * w.c_row + at_c, from_c, panels)
            if r < active:
                copy(a.cells + (n_prev + r) * w.c_row + at_c, from_c, panels)

    return keep_border, enter


@functools.cache
def forward_kernel(variant: Variant) -> Any:
    """The compiled forward kernel."""
    lanes, stored = variant.block.lanes, variant.stored
    vector_bytes, gate_bytes = variant.vector_bytes, variant.gate_bytes
    (stage_chunk, project_chunk), compute_panels = _make_begin_chunk(variant), _make_compute_panels(variant)
    project_hidden, clear_padding, reset_rows = _make_finish_step(variant)
    keep_border, enter = _make_borders(variant)
    terms, operand_row = row_sizes(variant)
    shape_tiles, release_tiles = tile_state(variant)
    read = make_read(ForwardArgs)

    @inline
    def widths_of(a):
        panels, h_vectors = -(-a.hidden // lanes), -(-a.width // lanes)
        # The range of a row of h that this member writes: its panels, or its columns of a projection.
        first = 4 * a.column_begin if a.m != 0 else a.panel_begin
        end = min(4 * a.column_end, h_vectors) if a.m != 0 else a.panel_end
        return Widths(
            terms(a.inputs), terms(a.width), terms(a.hidden), operand_row(a.inputs), panels * vector_bytes,
            operand_row(a.width), operand_row(a.hidden), panels * gate_bytes, panels * 4 * lanes * stored,
            a.z if a.z != 0 else a.gates, first, end - first,
        )  # fmt: skip

    @inline
    def step_of(a, s):
        t = walk(a.reverse, a.steps, s)
        return Step(
            s, min(a.row_end, active_rows(a.batch_sizes, a.batch, t)), row_start(a.row_starts, a.batch, t),
            user_index(a.packed, a.row_starts, a.batch, t), a.h + (s & 1) * a.h_half, a.h + (1 - (s & 1)) * a.h_half,
        )  # fmt: skip

    @inline
    def run(a):
        """Processes a member's arguments; returns the address of those that come next on this thread."""
        if not my_turn(a):
            return 0
        w = widths_of(a)
        passed = 0
        shape_tiles(a.row_end - a.row_begin)
        if a.resume != 0:
            enter(a, w)
        for s in range(a.first - 1, a.last):
            if s >= a.first:
                if (s - a.first) % a.chunk == 0:
                    if a.fused == 0:
                        project_chunk(a, w, s)
                    elif a.x_stage != 0:
                        stage_chunk(a, w, s)
                step = step_of(a, s)
                compute_panels(a, w, step)
                if a.m != 0:
                    if a.lockstep != 0:
                        passed = meet(a, passed)
                    project_hidden(a, w, step)
                if a.y != 0 and a.packed == 0 and a.batch_sizes != 0:
                    clear_padding(a, w, step)
            if a.reset != 0 and s + 1 < a.steps:
                reset_rows(a, w, s + 1)
            if a.segment != 0 and a.resume == 0 and s + 1 < a.steps and (s + 1) % a.segment == 0:
                keep_border(a, w, s + 1)
            if a.lockstep != 0:
                passed = meet(a, passed)
        end_turn(a)
        return a.following

    @kernel(variant.key)
    def lstm_fwd_kernel(address):
        mode = flush_denormals()
        while address != 0:
            address = run(read(address))
        release_tiles()
        set_mode(mode)

    return lstm_fwd_kernel
