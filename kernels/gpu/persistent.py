"""The Triton design for hidden sizes whose recurrent weights fit one program, which computes a tile of rows alone.

A program owns BT rows of one direction and all H units, for all T steps.  No program waits for another; h, c and the
weights stay in registers; what a step reads from memory (z, or the gates in backward) is requested one step earlier.

    grid: D x ceil(B / BT)

**Weights in registers**, as in ``split.py``: batched products, one slice per warp, and a ``while`` loop.  Forward
splits the rows of the weights (each warp makes all gates of U / KW units from all of h, so nothing is summed across
warps); backward splits K so that a warp multiplies the dz that it has just computed itself, and sums dh across warps
through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    backward_step,
    collect,
    extent,
    forward_step,
    gates_to,
    load_gates,
    product,
    store_gates,
    store_norms,
    tile_row,
)

SIZES = ["T", "B", "N", "entered", "step", "stride"]  # one kernel for all of their values


@triton.jit(do_not_specialize=SIZES)
def lstm_fwd_kernel(
    h,  # (N, D * H): the output
    gates,  # (D, N, 4H): z without its recurrent part; where SAVE is set, the activated gates on return
    cells,  # (D, N, H), float32: every c_t, where SAVE is set
    c,  # (D, B, H), float32: c_0 on entry, c_n on return
    w_hh,  # (D, 4H, H)
    reset,  # N int32, where HAS_RESET is set
    offsets,  # (T + 1,) int64, where RAGGED is set
    T,
    B,
    N,
    entered,  # 1: z of each row's first step has W_hh h_0 already
    step,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """All T steps of BT rows."""
    tiles = tl.cdiv(B, BT)
    i_tile = tl.program_id(0) % tiles
    d = (tl.program_id(0) // tiles).to(tl.int64)
    N = N.to(tl.int64)
    h += d * H
    gates += d * N * 4 * H
    cells += d * N * H
    w_hh += d * 4 * H * H

    o_u = tl.arange(0, U)[None, :]
    row = i_tile * BT + tl.arange(0, BT)[:, None]
    m_state = (row < B) & (o_u < H)
    w_row, w_unit = tile_row(tl.arange(0, KW)[:, None] * (4 * U // KW) + tl.arange(0, 4 * U // KW)[None, :], 0, H)
    k = tl.arange(0, U)[None, None, :]
    w = tl.load(w_hh + w_row[:, :, None] * H + k, mask=(w_unit < H)[:, :, None] & (k < H), other=0.0)

    p_c = c + (d * B + row) * H + o_u
    c_t = tl.load(p_c, mask=m_state, other=0.0)
    h_t = tl.zeros((BT, U), DTYPE)

    t = tl.where(d == 0, 0, T - 1).to(tl.int64)
    first = row.to(tl.int64) * stride  # (BT, 1): position of a row in a step
    begin, rows = extent(t, offsets, B, True, step, RAGGED)
    z_i, z_f, z_g, z_o = load_gates(gates, begin + first, o_u, (row < rows) & (o_u < H), H)
    rows_before = 0  # rows that have a step before this one
    i = 0
    while i < T:
        # requested now, needed in the next step
        more = i < T - 1
        t_next = tl.where(more, tl.where(d == 0, t + 1, t - 1), t)
        begin_next, rows_next = extent(t_next, offsets, B, more, step, RAGGED)
        n_i, n_f, n_g, n_o = load_gates(gates, begin_next + first, o_u, (row < rows_next) & (o_u < H), H)

        o_t = begin + first
        m = (row < rows) & (o_u < H)
        if HAS_RESET:
            keep = tl.load(reset + o_t, mask=row < rows, other=0) == 0
            h_t = tl.where(keep, h_t, 0.0)
            c_t = tl.where(keep, c_t, 0.0)
        operand = tl.broadcast_to(tl.expand_dims(tl.trans(h_t), 0), (KW, U, BT))
        acc = product(w, operand, None, PRECISION)  # (KW, 4U / KW, BT)
        r_i, r_f, r_g, r_o = collect(tl.reshape(acc, (1, 4 * U, BT)), 1, 4, U, BT, 32 * KW)
        m_r = (row < rows_before).to(tl.int32) >= entered
        i_t, f_t, g_t, o_gate, c_new, h_new = forward_step(
            z_i, z_f, z_g, z_o, r_i, r_f, r_g, r_o, m_r, c_t, DTYPE
        )  # fmt: skip
        h_new = h_new.to(DTYPE)
        tl.store(h + o_t * (D * H) + o_u, h_new, mask=m)
        if SAVE:
            store_gates(gates, o_t, o_u, i_t.to(DTYPE), f_t.to(DTYPE), g_t.to(DTYPE), o_gate.to(DTYPE), m, H)
            tl.store(cells + o_t * H + o_u, c_new, mask=m)
        # a row that has no step t keeps its state: it has ended, or has not begun
        c_t = tl.where(m, c_new, c_t)
        h_t = tl.where(m, h_new, h_t)
        z_i, z_f, z_g, z_o = n_i, n_f, n_g, n_o
        rows_before = rows
        t, begin, rows = t_next, begin_next, rows_next
        i += 1
    tl.store(p_c, c_t, mask=m_state)


@triton.jit(do_not_specialize=SIZES)
def lstm_bwd_kernel(
    dz,  # (D, N, 4H): the gradient before the activations
    dc,  # (D, B, H), float32: the gradient of c_n on entry, that of c_0 on return
    norms,  # (2, D, 1, T, B), float64: sums of squares over the units, where NORMS is set
    dy,  # (N, D * H): the gradient of the output, where HAS_DY is set
    dh_n,  # (D, B, H), where HAS_DH_N is set
    dcells,  # (N, D * H), float32: the gradient of every c_t, where HAS_DCELLS is set
    gates,  # (D, N, 4H), activated
    cells,  # (D, N, H), float32
    c_0,  # (D, B, H), where HAS_C_0 is set
    w_hh,  # (D, 4H, H)
    reset,  # N int32, where HAS_RESET is set
    offsets,  # (T + 1,) int64, where RAGGED is set
    T,
    B,
    N,
    step,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DH_N: tl.constexpr,
    HAS_DCELLS: tl.constexpr,
    HAS_C_0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RAGGED: tl.constexpr,
    NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """All T steps of BT rows, backwards."""
    tiles = tl.cdiv(B, BT)
    i_tile = tl.program_id(0) % tiles
    d = (tl.program_id(0) // tiles).to(tl.int64)
    N = N.to(tl.int64)
    dz += d * N * 4 * H
    gates += d * N * 4 * H
    cells += d * N * H
    w_hh += d * 4 * H * H

    o_u = tl.arange(0, U)[None, :]
    m_u = o_u < H
    row = i_tile * BT + tl.arange(0, BT)[:, None]
    m_state = (row < B) & m_u
    w_row, w_unit = tile_row(tl.arange(0, KW)[:, None] * (4 * U // KW) + tl.arange(0, 4 * U // KW)[None, :], 0, H)
    unit = tl.arange(0, U)[None, :, None]
    w = tl.load(w_hh + w_row[:, None, :] * H + unit, mask=(w_unit < H)[:, None, :] & (unit < H), other=0.0)

    o_state = (d * B + row) * H + o_u
    dc_t = tl.load(dc + o_state, mask=m_state, other=0.0)
    dh_t = tl.zeros((BT, U), tl.float32)  # from the next step
    if HAS_DH_N:
        dh_t = tl.load(dh_n + o_state, mask=m_state, other=0.0).to(tl.float32)

    t = tl.where(d == 0, T - 1, 0).to(tl.int64)
    first = row.to(tl.int64) * stride  # (BT, 1): position of a row in a step
    begin, rows = extent(t, offsets, B, True, step, RAGGED)
    m = (row < rows) & m_u
    i_t, f_t, g_t, o_gate = load_gates(gates, begin + first, o_u, m, H)
    c_t = tl.load(cells + (begin + first) * H + o_u, mask=m, other=0.0)
    dy_t = tl.zeros((BT, U), DTYPE)
    if HAS_DY:
        dy_t = tl.load(dy + (begin + first) * (D * H) + d * H + o_u, mask=m, other=0.0)
    i = 0
    while i < T:
        o_t = begin + first
        m = (row < rows) & m_u
        # requested now, needed in the next step: those of the step before in time, whose c enters this one
        more = i < T - 1
        t_before = tl.where(more, tl.where(d == 0, t - 1, t + 1), t)
        begin_before, rows_before = extent(t_before, offsets, B, more, step, RAGGED)
        o_before = begin_before + first
        m_next = (row < rows_before) & m_u
        n_i, n_f, n_g, n_o = load_gates(gates, o_before, o_u, m_next, H)
        c_next = tl.load(cells + o_before * H + o_u, mask=m_next, other=0.0)
        n_dy = tl.zeros((BT, U), DTYPE)
        if HAS_DY:
            n_dy = tl.load(dy + o_before * (D * H) + d * H + o_u, mask=m_next, other=0.0)

        c_before = c_next
        if HAS_C_0:
            starts = m & (row >= rows_before)
            c_before = tl.where(starts, tl.load(c_0 + o_state, mask=starts, other=0.0).to(tl.float32), c_before)
        keep = row < rows
        if HAS_RESET:
            keep = tl.load(reset + o_t, mask=row < rows, other=1) == 0
            c_before = tl.where(keep, c_before, 0.0)
        dc_in = dc_t
        if HAS_DCELLS:
            dc_in += tl.load(dcells + o_t * (D * H) + d * H + o_u, mask=m, other=0.0)
        dh = dh_t + dy_t.to(tl.float32)
        dz_i, dz_f, dz_g, dz_o, dc_in, dc_before = backward_step(
            dc_in, dh, i_t, f_t, g_t, o_gate, c_t, c_before, DTYPE
        )  # fmt: skip
        if NORMS:
            i_row = i_tile * BT + tl.arange(0, BT)
            store_norms(norms, d, D, t, i_row, dh, dc_in, m, i_row < rows, T, B)
        dz_i = tl.where(m, dz_i, 0.0).to(DTYPE)
        dz_f = tl.where(m, dz_f, 0.0).to(DTYPE)
        dz_g = tl.where(m, dz_g, 0.0).to(DTYPE)
        dz_o = tl.where(m, dz_o, 0.0).to(DTYPE)
        store_gates(dz, o_t, o_u, dz_i, dz_f, dz_g, dz_o, m, H)
        # gradients for the step before; a row without step t has not begun its walk back and keeps what it has
        operand = tl.reshape(gates_to(dz_i, dz_f, dz_g, dz_o, U, BT), (KW, 4 * U // KW, BT))
        dh_before = collect(product(w, operand, None, PRECISION), KW, 1, U, BT, 32 * KW)[0]
        dh_t = tl.where(m, tl.where(keep, dh_before, 0.0), dh_t)
        dc_t = tl.where(m, tl.where(keep, dc_before, 0.0), dc_t)
        i_t, f_t, g_t, o_gate, c_t, dy_t = n_i, n_f, n_g, n_o, c_next, n_dy
        t, begin, rows = t_before, begin_before, rows_before
        i += 1
    tl.store(dc + o_state, dc_t, mask=m_state)
