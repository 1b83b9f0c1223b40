"""The backward kernel, which each thread of a launch runs; the package's docstring has sizes, memory and partition.

A launch processes its chunks of steps from last to first: first the steps of the chunk one by one, then the products
over all its tokens, which are the gradients of the weights and of the input.  Its steps may begin and end inside a
chunk: what the chunk has so far stays in scratch until the launch of the steps before completes it, so the bits do not
depend on how the steps are divided among launches.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .. import cell
from .arguments import BackwardArgs
from .copying import row_functions
from .jit import inline, kernel
from .matmul import Left, Right, make_matrix_product
from .memory import fetch, load_int, make_read, store_double, store_int
from .microkernel import Around, make_block
from .mode import flush_denormals, set_mode
from .steps import active_rows, resets, row_start, user_index, walk
from .sync import end_turn, meet, my_turn, opened
from .tiles import tile_state
from .variant import Variant, row_sizes

JOINED_ROWS = 192  # tokens that are multiplied with a strip of W_ih while it is in the cache
NORM_PANELS = 4  # panels per partial sum of a norm: those of a column panel, which belongs to one member


class TileEnd(NamedTuple):
    """Destination of a tile of a weight gradient."""

    weight: int
    add: int  # 1: add to the sums of earlier chunks


class Widths(NamedTuple):
    """Derived from a member's arguments: counts, bytes per row, and its range of a row of dh."""

    panels: int
    part: int  # rows of this part of the batch
    c_row: int
    h_row: int
    dh_operand_row: int
    gates_row: int
    dz_row: int  # of a panel
    dz_panel: int
    terms: int  # of the tokens of the longest chunk
    tokens: int  # in these
    h_first: int  # in vectors
    h_count: int
    norm_row: int
    norms_c: int  # address of those of c


class Chunk(NamedTuple):
    """A chunk of steps."""

    first: int  # step in the direction's order
    last: int
    k_base: int  # tokens of the part before the chunk
    tokens: int
    add: int  # 1: earlier chunks have written weight gradients


class Step(NamedTuple):
    """A step, for one member."""

    t: int
    end: int  # end of the member's active rows
    n: int  # of row 0
    k: int  # of row 0: its index among the tokens of the chunk
    position: int  # in the user's tensors
    n_prev: int  # at the step before, in the direction's order
    position_prev: int
    continued: int  # rows that were active at the step before
    back: int  # 1: take W from its end


def _make_walk(variant: Variant) -> Any:
    """(widths_of, last_chunk, chunk_of, step_of)."""
    lanes, panel, stored, values = variant.block.lanes, variant.block.panel, variant.stored, variant.products.values
    vector_bytes, dz_row = variant.vector_bytes, panel * variant.operand_size
    terms, operand_row = row_sizes(variant)

    @inline
    def widths_of(a):
        panels, h_vectors = -(-a.hidden // lanes), -(-a.width // lanes)
        first = 4 * a.column_begin
        norm_row = 8 * -(-max(panels, h_vectors) // NORM_PANELS)
        return Widths(
            panels, a.part_end - a.part_begin, panels * vector_bytes, h_vectors * vector_bytes, operand_row(a.width),
            panels * panel * stored, dz_row, a.chunk_tokens * dz_row, terms(a.chunk_tokens),
            terms(a.chunk_tokens) * values, first, min(4 * a.column_end, h_vectors) - first,
            norm_row, a.norms + a.steps * a.batch * norm_row,
        )  # fmt: skip

    @inline
    def last_chunk(a):
        """The number of the chunk that has the step before ``last``, or of a later one."""
        return a.chunks - 1 if a.chunk_borders != 0 else -(-a.last // a.chunk) - 1

    @inline
    def chunk_of(a, w, number):
        first, last = number * a.chunk, min((number + 1) * a.chunk, a.steps)
        if a.chunk_borders != 0:
            first, last = load_int(a.chunk_borders + 8 * number), load_int(a.chunk_borders + 8 * number + 8)
        one, other = walk(a.reverse, a.steps, first), walk(a.reverse, a.steps, last - 1)
        k_base = row_start(a.part_starts, w.part, min(one, other))
        count = row_start(a.part_starts, w.part, max(one, other) + 1) - k_base
        return Chunk(first, last, k_base, count, 1 if last < a.steps else 0)

    @inline
    def step_of(a, w, chunk, s):
        t, t_prev = walk(a.reverse, a.steps, s), walk(a.reverse, a.steps, s - 1)
        active = active_rows(a.batch_sizes, a.batch, t)
        return Step(
            t, min(a.row_end, active), row_start(a.row_starts, a.batch, t),
            row_start(a.part_starts, w.part, t) - chunk.k_base - a.part_begin,
            user_index(a.packed, a.row_starts, a.batch, t),
            row_start(a.row_starts, a.batch, t_prev) if s > 0 else 0,
            user_index(a.packed, a.row_starts, a.batch, t_prev) if s > 0 else 0,
            min(active, active_rows(a.batch_sizes, a.batch, t_prev)) if s > 0 else 0, s & 1,
        )  # fmt: skip

    return widths_of, last_chunk, chunk_of, step_of


def _make_token_store(variant: Variant) -> Any:
    """(store_token, clear_tokens): operands whose terms run over tokens, in panels."""
    store, zeros, store_half = variant.ops.store, variant.ops.zeros, variant.ops.store_half
    gate_bytes, values, terms = variant.gate_bytes, variant.products.values, row_sizes(variant)[0]

    @inline
    def store_value(panel, k, value):
        """Writes a vector of token k; ``panel``: its place in the first token of the panel."""
        store(panel + k * gate_bytes, value)

    @inline
    def store_in_pair(panel, k, value):
        store_half(panel + (k >> 1) * gate_bytes, value, k & 1)

    store_token = store_in_pair if variant.products.paired else store_value

    @inline
    def clear_tokens(panel, tokens):
        """Zeroes what the terms have beyond their last token."""
        for k in range(tokens, terms(tokens) * values):
            store_token(panel, k, zeros())

    return store_token, clear_tokens


def _make_project_back(variant: Variant) -> Any:
    """(complete_dh, project_back, keep_hidden): the steps of a layer with a projection, h = W_hr m."""
    ops, lanes, stored, vector_bytes, gate_bytes = (
        variant.ops, variant.block.lanes, variant.stored, variant.vector_bytes, variant.gate_bytes
    )  # fmt: skip
    load, store, square_sum, load_storage = ops.load, ops.store, ops.square_sum, ops.make_load(variant.storage)
    store_operand, operand_bytes, paired = (
        ops.make_store(variant.operand), lanes * variant.operand_size, variant.products.paired
    )  # fmt: skip
    matrix_product, narrow_row = make_matrix_product(variant), row_functions(variant).narrow_row
    (store_token, _), (terms, _) = _make_token_store(variant), row_sizes(variant)

    @inline
    def complete_dh(a, w, step):
        """dh_t, complete once dy is added; dW_hr also needs it panel by panel."""
        for r in range(a.row_begin, step.end):
            squares = 0.0
            for v in range(w.h_first, w.h_first + w.h_count):
                at = a.dh + r * w.h_row + v * vector_bytes
                value = load(at)
                if a.dy != 0:
                    source = a.dy + step.position * a.dy_step + load_int(a.dy_rows + 8 * r) + v * lanes * stored
                    value = value + load_storage(source, a.width - v * lanes)
                if a.norms != 0:
                    squares += square_sum(value)
                    if (v + 1) % NORM_PANELS == 0 or v + 1 == w.h_first + w.h_count:
                        norm = (step.t * a.batch + r) * w.norm_row + v // NORM_PANELS * 8
                        store_double(a.norms + norm, squares)
                        squares = 0.0
                store(at, value)
                if paired:
                    store_operand(a.dh_operands + r * w.dh_operand_row + v * operand_bytes, value, lanes)
                if a.dw_r != 0:
                    panel = a.dh_chunk + v // 4 * w.terms * gate_bytes
                    store_token(panel + v % 4 * vector_bytes, step.k + r, value)

    @inline
    def project_back(a, w, step):
        """dm = W_hr^T dh."""
        matrix_product(
            step.end - a.row_begin,
            Left(a.dh_operands, a.dh_operand_rows + 8 * a.row_begin, 1, 0, terms(a.width)),
            Right(a.w_r, -(-a.panel_begin // 4), -(-a.panel_end // 4), a.hidden, step.back),
            a.dm,
            a.m_rows + 8 * a.row_begin,
        )

    @inline
    def keep_hidden(a, w, step):
        """Copies m_t, which the cell has written to dm, for dW_hr."""
        for r in range(a.row_begin, step.end):
            narrow_row(a.m_stage + (step.k + r) * a.hidden * stored, a.dm + r * w.c_row, a.hidden)

    return complete_dh, project_back, keep_hidden


def _make_vector_gradients(variant: Variant) -> Any:
    """Gradients of one vector of units of one row; returns those that arrive at h and c."""
    ops, lanes, stored, vector_bytes = variant.ops, variant.block.lanes, variant.stored, variant.vector_bytes
    load, store, tanh, first_lanes = ops.load, ops.store, ops.tanh, ops.first_lanes
    load_storage, store_operand = ops.make_load(variant.storage), ops.make_store(variant.operand)
    (store_token, _), gate_bytes = _make_token_store(variant), variant.gate_bytes
    operand_bytes, paired = lanes * variant.operand_size, variant.products.paired
    hidden_state, cell_grad = inline(cell.hidden_state), inline(cell.cell_grad)
    gate_grads, cell_grad_prev = inline(cell.gate_grads), inline(cell.cell_grad_prev)

    @inline
    def vector_gradients(a, w, step, r, p, c_prev_row, dy_row):
        unit, at_vector = p * lanes, p * vector_bytes
        left = a.hidden - unit
        at = a.gates + (step.n + r) * w.gates_row + unit * 4 * stored
        i, f = load_storage(at, lanes), load_storage(at + lanes * stored, lanes)
        g, o = load_storage(at + 2 * lanes * stored, lanes), load_storage(at + 3 * lanes * stored, lanes)
        tanh_c = tanh(load(a.cells + (step.n + r) * w.c_row + at_vector))
        c_prev = load(c_prev_row + at_vector)
        if a.dm != 0:
            grad_h = load(a.dm + r * w.c_row + at_vector)
            if a.dw_r != 0:
                # dm is no longer needed; m_t is kept in its place until it is copied for dW_hr.
                store(a.dm + r * w.c_row + at_vector, hidden_state(o, tanh_c))
        else:
            grad_h = load(a.dh + r * w.c_row + at_vector)
            if a.dy != 0:
                grad_h = grad_h + load_storage(dy_row + unit * stored, left)
        grad_c = load(a.dc + r * w.c_row + at_vector)
        if a.dcells != 0:
            grad_c = grad_c + load(a.dcells + (step.n + r) * w.c_row + at_vector)
        grad_c = cell_grad(grad_c, grad_h, o, tanh_c)
        dz_i, dz_f, dz_g, dz_o = gate_grads(grad_c, grad_h, i, f, g, o, c_prev, tanh_c)
        if left < lanes:  # units beyond H may hold NaN; they must not reach a sum
            dz_i, dz_f = first_lanes(dz_i, left), first_lanes(dz_f, left)
            dz_g, dz_o = first_lanes(dz_g, left), first_lanes(dz_o, left)
            grad_c = first_lanes(grad_c, left)
            f = first_lanes(f, left)
        store(a.dc + r * w.c_row + at_vector, cell_grad_prev(grad_c, f))
        at = a.dz + p * w.dz_panel + (step.k + r) * w.dz_row
        store_operand(at, dz_i, lanes)
        store_operand(at + operand_bytes, dz_f, lanes)
        store_operand(at + 2 * operand_bytes, dz_g, lanes)
        store_operand(at + 3 * operand_bytes, dz_o, lanes)
        if paired and a.dw_x != 0:
            at = a.dz_terms + p * w.terms * gate_bytes
            store_token(at, step.k + r, dz_i)
            store_token(at + vector_bytes, step.k + r, dz_f)
            store_token(at + 2 * vector_bytes, step.k + r, dz_g)
            store_token(at + 3 * vector_bytes, step.k + r, dz_o)
        return grad_h, grad_c

    return vector_gradients


def _make_cell_gradients(variant: Variant) -> Any:
    """(cell_gradients, reset_rows): a step of a member's rows and panels, without its products."""
    lanes, stored, vector_bytes = variant.block.lanes, variant.stored, variant.vector_bytes
    square_sum, clear = variant.ops.square_sum, row_functions(variant).clear
    vector_gradients = _make_vector_gradients(variant)

    @inline
    def fetch_back(a, w, step, r, p, dy_row):
        """Prefetches the step before: the processor does not by itself when time runs backwards, and at H = 16 reading
        the gates took longer than the arithmetic."""
        for line in range(0, 4 * lanes * stored, 64):
            fetch(a.gates + (step.n_prev + r) * w.gates_row + p * 4 * lanes * stored + line)
        if a.dy != 0:
            fetch(dy_row + (step.position_prev - step.position) * a.dy_step + p * lanes * stored)

    @inline
    def cell_gradients(a, w, step):
        for r in range(a.row_begin, step.end):
            c_prev_row = a.cells + (step.n_prev + r) * w.c_row if r < step.continued else a.c_0 + r * w.c_row
            if resets(a, step.position, r):
                c_prev_row = a.zero
            dy_row = a.dy + step.position * a.dy_step + load_int(a.dy_rows + 8 * r) if a.dy != 0 else 0
            squares_h, squares_c = 0.0, 0.0
            for p in range(a.panel_begin, a.panel_end):
                fetch_back(a, w, step, r, p, dy_row)
                grad_h, grad_c = vector_gradients(a, w, step, r, p, c_prev_row, dy_row)
                if a.norms != 0:
                    squares_h += square_sum(grad_h)
                    squares_c += square_sum(grad_c)
                    if (p + 1) % NORM_PANELS == 0 or p + 1 == a.panel_end:
                        norm = (step.t * a.batch + r) * w.norm_row + p // NORM_PANELS * 8
                        if a.dm == 0:
                            store_double(a.norms + norm, squares_h)
                        store_double(w.norms_c + norm, squares_c)
                        squares_h, squares_c = 0.0, 0.0

    @inline
    def reset_rows(a, w, step):
        """Zeroes the gradients that would pass a reset."""
        for r in range(a.row_begin, step.end):
            if resets(a, step.position, r):
                clear(a.dh + r * w.h_row + w.h_first * vector_bytes, w.h_count)
                clear(a.dc + r * w.c_row + a.panel_begin * vector_bytes, a.panel_end - a.panel_begin)

    return cell_gradients, reset_rows


def _make_copy_operands(variant: Variant, step_of: Any) -> Any:
    """(copy_operands, clear_beyond, clear_padding): the tokens of a chunk, once its steps are done.

    Copies of x, h_{t-1} and m_t for the weight gradients, and the addresses of dx.
    """
    rows, size, stored, gate_bytes = row_functions(variant), variant.size, variant.stored, variant.gate_bytes
    fill_strips, clear_stored, vector_bytes = rows.fill_strips, rows.clear_stored, variant.vector_bytes
    _, clear_tokens = _make_token_store(variant)
    whole = variant.products.values * variant.products.group  # tokens that are copied together

    @inline
    def list_token(a, w, step, r):
        """Lists the addresses of a token's dx, x, h_{t-1} and m_t."""
        k = step.k + r
        if a.dx_stage != 0:
            store_int(a.table + 8 * k, a.dx_stage + k * a.inputs * size)
        else:
            store_int(a.table + 8 * k, a.dx + step.position * a.dx_step + load_int(a.dx_rows + 8 * r))
        x = a.x + step.position * a.x_step + load_int(a.x_rows + 8 * r)
        if resets(a, step.position, r):
            h = a.zero
        elif r < step.continued:
            h = a.y + step.position_prev * a.y_step + load_int(a.y_rows + 8 * r)
        else:
            h = a.h_0 + load_int(a.h_0_rows + 8 * r) if a.h_0 != 0 else a.zero
        store_int(a.table + 8 * (w.tokens + k), x)
        store_int(a.table + 8 * (2 * w.tokens + k), h)
        store_int(a.table + 8 * (3 * w.tokens + k), a.m_stage + k * a.hidden * stored)

    @inline
    def copy_operands(a, w, chunk):
        """A member's range of the tokens, in whole groups."""
        groups = -(-chunk.tokens // whole)
        begin, end = groups * a.member // a.members * whole, groups * (a.member + 1) // a.members * whole
        for s in range(chunk.first, chunk.last):
            step = step_of(a, w, chunk, s)
            active = min(a.part_end, active_rows(a.batch_sizes, a.batch, step.t))
            for r in range(max(a.part_begin, begin - step.k), min(active, end - step.k)):
                list_token(a, w, step, r)
        if a.dw_x == 0:
            return
        for k in range(max(begin, chunk.tokens), end):  # no tokens, but terms have them
            for which in range(1, 4):
                store_int(a.table + 8 * (which * w.tokens + k), a.zero)
        for k in range(begin, end, whole):
            at = a.table + 8 * (w.tokens + k)
            fill_strips(a.x_strips, at, a.inputs, k, w.terms)
            fill_strips(a.h_strips, at + 8 * w.tokens, a.width, k, w.terms)
            if a.dm != 0:
                fill_strips(a.m_strips, at + 16 * w.tokens, a.hidden, k, w.terms)

    @inline
    def clear_beyond(a, w, chunk):
        """Zeroes the ends of the member's panels, which no token fills."""
        for v in range(4 * a.panel_begin, 4 * a.panel_end):
            clear_tokens(a.dz_terms + v // 4 * w.terms * gate_bytes + v % 4 * vector_bytes, chunk.tokens)
        for v in range(w.h_first, w.h_first + w.h_count if a.dm != 0 else 0):
            clear_tokens(a.dh_chunk + v // 4 * w.terms * gate_bytes + v % 4 * vector_bytes, chunk.tokens)

    @inline
    def clear_padding(a, w, step):
        """Zeroes dx of the rows that are not active at a step."""
        for r in range(max(a.part_begin, active_rows(a.batch_sizes, a.batch, step.t)), a.part_end):
            clear_stored(a.dx + step.position * a.dx_step + load_int(a.dx_rows + 8 * r), a.inputs)

    return copy_operands, clear_beyond, clear_padding


def _make_weight_gradients(variant: Variant) -> Any:
    """The weight gradients of a chunk: a member's range of the tiles."""
    ops, block, size, gate_bytes = variant.ops, variant.block, variant.size, variant.gate_bytes
    load_four, store_vectors, zero_four = ops.load_four, ops.store_vectors, ops.zero_four
    most, panel, paired = block.rows, block.panel, variant.products.paired
    terms, strip_begin = row_sizes(variant)[0], row_functions(variant).strip_begin

    def finish_tile(row, sums, e):
        at = e.weight + row * gate_bytes
        if e.add != 0:
            before = load_four(at)
            sums = (before[0] + sums[0], before[1] + sums[1], before[2] + sums[2], before[3] + sums[3])
        store_vectors(at, sums, panel)

    tile_block = make_block(variant, 4, Around(finish_tile), by_strip=True)

    @inline
    def weight_tile(w, chunk, job, depth, columns, weight, strips):
        """Tile ``job`` of a (depth, panel) gradient: a strip against a panel of dz (or dh)."""
        begin, end = strip_begin(depth, job), strip_begin(depth, job + 1)
        strip = strips + begin * w.terms * size
        segment = (strip, 0, 1, 0, terms(chunk.tokens), columns, columns)
        tile_block(end - begin, segment, TileEnd(weight + begin * gate_bytes, chunk.add))

    @inline
    def bias_tile(a, chunk, columns, at):
        """The sum of a panel of dz over all tokens."""
        if paired:
            tile_block(1, (a.ones, 0, 1, 0, terms(chunk.tokens), columns, columns), TileEnd(at, chunk.add))
            return
        i, f, g, o = zero_four()
        for k in range(chunk.tokens):
            row = load_four(columns + k * gate_bytes)
            i, f, g, o = i + row[0], f + row[1], g + row[2], o + row[3]
        if chunk.add != 0:
            row = load_four(at)
            i, f, g, o = i + row[0], f + row[1], g + row[2], o + row[3]
        store_vectors(at, (i, f, g, o), panel)

    @inline
    def weight_gradients(a, w, chunk):
        tiles_x, tiles_h, tiles_r = -(-a.inputs // most), -(-a.width // most), -(-a.hidden // most)
        jobs = tiles_x + tiles_h + 1
        for job in range(w.panels * jobs * a.member // a.members, w.panels * jobs * (a.member + 1) // a.members):
            p, j = job // jobs, job % jobs
            dz = a.dz_terms + p * w.terms * gate_bytes
            if j < tiles_x:
                weight_tile(w, chunk, j, a.inputs, dz, a.dw_x + p * a.inputs * gate_bytes, a.x_strips)
            elif j < tiles_x + tiles_h:
                dw_h = a.dw_h + p * a.width * gate_bytes
                weight_tile(w, chunk, j - tiles_x, a.width, dz, dw_h, a.h_strips)
            else:
                bias_tile(a, chunk, dz, a.db + p * gate_bytes)
        jobs = -(-a.width // panel) * tiles_r if a.dm != 0 else 0
        for job in range(jobs * a.member // a.members, jobs * (a.member + 1) // a.members):
            q, j = job // tiles_r, job % tiles_r
            dh = a.dh_chunk + q * w.terms * gate_bytes
            weight_tile(w, chunk, j, a.hidden, dh, a.dw_r + q * a.hidden * gate_bytes, a.m_strips)

    return weight_gradients


def _make_input_gradients(variant: Variant) -> Any:
    """dx of a member's range of the tokens of a chunk."""
    panel, size, panel_terms = variant.block.panel, variant.size, variant.block.panel // variant.products.values
    matrix_product, narrow_row = make_matrix_product(variant), row_functions(variant).narrow_row

    @inline
    def narrow_rows(a, w, chunk, begin, end):
        """Converts sums from the compute dtype to dx."""
        for s in range(chunk.first, chunk.last):
            t = walk(a.reverse, a.steps, s)
            k_here = row_start(a.part_starts, w.part, t) - chunk.k_base
            k_next = row_start(a.part_starts, w.part, t + 1) - chunk.k_base
            dx_here = a.dx + user_index(a.packed, a.row_starts, a.batch, t) * a.dx_step
            for k in range(max(begin, k_here), min(end, k_next)):
                target = dx_here + load_int(a.dx_rows + 8 * (a.part_begin + k - k_here))
                narrow_row(target, a.dx_stage + k * a.inputs * size, a.inputs)

    @inline
    def input_gradients(a, w, chunk):
        begin, end = chunk.tokens * a.member // a.members, chunk.tokens * (a.member + 1) // a.members
        done = begin
        while done < end:
            n = min(JOINED_ROWS, end - done)
            matrix_product(
                n,
                Left(a.dz + done * w.dz_row, a.panel_rows, w.panels, w.dz_panel, panel_terms),
                Right(a.w_x, 0, -(-a.inputs // panel), a.inputs, 0),
                0,
                a.table + 8 * done,
            )
            done += n
        if a.dx_stage != 0:
            narrow_rows(a, w, chunk, begin, end)

    return input_gradients


@functools.cache
def backward_kernel(variant: Variant) -> Any:
    """The compiled backward kernel."""
    panel_terms = variant.block.panel // variant.products.values
    widths_of, last_chunk, chunk_of, step_of = _make_walk(variant)
    complete_dh, project_back, keep_hidden = _make_project_back(variant)
    cell_gradients, reset_rows = _make_cell_gradients(variant)
    copy_operands, clear_beyond, clear_padding = _make_copy_operands(variant, step_of)
    weight_gradients, (shape_tiles, release_tiles) = _make_weight_gradients(variant), tile_state(variant)
    input_gradients, matrix_product = _make_input_gradients(variant), make_matrix_product(variant)
    read = make_read(BackwardArgs)

    @inline
    def recurrent_gradients(a, w, step):
        """dh_{t-1} = W_hh^T dz."""
        matrix_product(
            step.end - a.row_begin,
            Left(a.dz + (step.k + a.row_begin) * w.dz_row, a.panel_rows, w.panels, w.dz_panel, panel_terms),
            Right(a.w_h, a.column_begin, a.column_end, a.width, step.back),
            a.dh,
            a.h_rows + 8 * a.row_begin,
        )

    @inline
    def step_back(a, w, step, passed):
        if a.dm != 0:
            complete_dh(a, w, step)
            if a.lockstep != 0:
                passed = meet(a, passed)
            project_back(a, w, step)
        cell_gradients(a, w, step)
        if a.lockstep != 0:
            passed = meet(a, passed)
        recurrent_gradients(a, w, step)
        if a.dm != 0 and a.dw_r != 0 and a.panel_begin == 0:
            keep_hidden(a, w, step)
        if a.reset != 0:
            reset_rows(a, w, step)
        return passed

    @inline
    def finish_steps(a, w, chunk):
        """What the products over all tokens of a chunk read, once its steps are done."""
        copy_operands(a, w, chunk)
        if a.dw_x != 0:
            clear_beyond(a, w, chunk)
        if a.dx != 0 and a.packed == 0 and a.batch_sizes != 0:
            for s in range(chunk.first + a.member, chunk.last, a.members):
                clear_padding(a, w, step_of(a, w, chunk, s))
        shape_tiles(JOINED_ROWS)

    @inline
    def run(a):
        """Processes a member's arguments; returns the address of those that come next on this thread."""
        if not my_turn(a):
            return 0
        w = widths_of(a)
        passed = 0
        for number in range(last_chunk(a), -1, -1):
            chunk = chunk_of(a, w, number)
            if chunk.first >= a.last:
                continue
            if chunk.last <= a.first:
                break
            shape_tiles(a.row_end - a.row_begin)
            for s in range(min(chunk.last, a.last) - 1, max(chunk.first, a.first) - 1, -1):
                passed = step_back(a, w, step_of(a, w, chunk, s), passed)
            if chunk.first < a.first:  # the launch of the steps before completes it
                break
            if a.dm != 0 and a.dw_r != 0:  # every m_t of the chunk is in its place
                passed = meet(a, passed)
            finish_steps(a, w, chunk)
            passed = meet(a, passed)
            if opened(a):  # a member did not start: the table of dx lacks its addresses
                return 0
            if a.dw_x != 0:
                weight_gradients(a, w, chunk)
            if a.dx != 0:
                input_gradients(a, w, chunk)
            passed = meet(a, passed)
        end_turn(a)
        return a.following

    @kernel(variant.key)
    def lstm_bwd_kernel(address):
        mode = flush_denormals()
        while address != 0:
            address = run(read(address))
        release_tiles()
        set_mode(mode)

    return lstm_bwd_kernel
