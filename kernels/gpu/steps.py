"""What the kernels of the designs that exchange data read for a step and write after it, all but the exchange.

d direction, i the step counted in the walk, t its time; BT rows of a tile, U units of a program.  ``sizes`` are (T, B,
N, step, stride) of a call, ``FLAGS`` constants: of forward (HAS_RESET, RAGGED), of backward (HAS_DY, HAS_DH_N,
HAS_DCELLS, HAS_C_0, HAS_RESET, RAGGED).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    active,
    backward_step,
    forward_step,
    load_gates,
    position,
    store_gates,
    store_norms,
    to_bits,
)


@triton.jit
def own_entries(gates, t, row, i_row, rows, o_u, offsets, sizes, H: tl.constexpr, RAGGED: tl.constexpr):
    """(positions (BT,), rows that have step t, entries (BT, U) that do, their four gates, or z) of a program."""
    _, B, _, step, stride = sizes
    m_row = (i_row < rows) & active(t, row, offsets, B, True, RAGGED)
    o_t = position(t, row, offsets, step, stride, RAGGED)
    m = m_row[:, None] & (o_u < H)
    return o_t, m_row, m, load_gates(gates, o_t[:, None], o_u, m, H)


@triton.jit
def forward_times(i, d, T):
    """(t, the time before it in the walk); t where there is none."""
    t = tl.where(d == 0, i, T - 1 - i).to(tl.int64)
    return t, tl.where(i > 0, tl.where(d == 0, t - 1, t + 1), t)


@triton.jit
def read_forward(given, times, row, i_row, rows, o_u, i, d, sizes, H: tl.constexpr, FLAGS: tl.constexpr):
    """All that a step needs but h of the step before.

    ``given``: the kernel's (gates, c, reset, offsets), the first of the direction.  Returns (positions (BT,), entries
    (BT, U) that have the step, (z_i, z_f, z_g, z_o, c_before), the address of c, the rows (BT,) into which h goes on,
    the rows that have the step before).
    """
    gates, c, reset, offsets = given
    t, t_before = times
    B = sizes[1]
    HAS_RESET: tl.constexpr = FLAGS[0]
    RAGGED: tl.constexpr = FLAGS[1]
    o_t, m_row, m, z = own_entries(gates, t, row, i_row, rows, o_u, offsets, sizes, H, RAGGED)
    z_i, z_f, z_g, z_o = z
    p_c = c + (d * B + row[:, None]) * H + o_u
    c_before = tl.load(p_c, mask=m, other=0.0)
    keep = m_row
    if HAS_RESET:
        keep = tl.load(reset + o_t, mask=m_row, other=1) == 0
        c_before = tl.where(keep[:, None], c_before, 0.0)
    m_before = m_row & active(t_before, row, offsets, B, i > 0, RAGGED)
    return o_t, m, (z_i, z_f, z_g, z_o, c_before), p_c, keep, m_before


@triton.jit
def forward_cell(entering, recurrent, m_before, entered, DTYPE: tl.constexpr):
    """(i, f, g, o, c, h) of a step, from what :func:`read_forward` calls z and c, and the recurrent part of z."""
    z_i, z_f, z_g, z_o, c_before = entering
    r_i, r_f, r_g, r_o = recurrent
    m_r = (m_before.to(tl.int32) >= entered)[:, None]
    return forward_step(z_i, z_f, z_g, z_o, r_i, r_f, r_g, r_o, m_r, c_before, DTYPE)


@triton.jit
def write_forward(gates, cells, p_c, o_t, o_u, m, values, H: tl.constexpr, SAVE: tl.constexpr, DTYPE: tl.constexpr):
    """c, and where SAVE is set gates and cells; h is the kernel's to write, and first.  ``values``: (i, f, g, o, c)."""
    i_t, f_t, g_t, o_gate, c_t = values
    tl.store(p_c, c_t, mask=m)
    if SAVE:
        i_t, f_t, g_t, o_gate = i_t.to(DTYPE), f_t.to(DTYPE), g_t.to(DTYPE), o_gate.to(DTYPE)
        store_gates(gates, o_t[:, None], o_u, i_t, f_t, g_t, o_gate, m, H)
        tl.store(cells + o_t[:, None] * H + o_u, c_t, mask=m)


@triton.jit
def backward_times(i, d, T):
    """(t, the time whose gradients have just been computed, the time whose state entered step t); t where none is."""
    t = tl.where(d == 0, T - 1 - i, i).to(tl.int64)
    t_after = tl.where(i > 0, tl.where(d == 0, t + 1, t - 1), t)
    t_before = tl.where(i < T - 1, tl.where(d == 0, t - 1, t + 1), t)
    return t, t_after, t_before


@triton.jit
def arriving(t_after, row, m_row, reset, offsets, i, sizes, FLAGS: tl.constexpr):
    """(BT,) of the step after t: which rows have it, their positions, and from which a gradient of h passes on."""
    _, B, _, step, stride = sizes
    HAS_RESET: tl.constexpr = FLAGS[4]
    RAGGED: tl.constexpr = FLAGS[5]
    m_after = m_row & active(t_after, row, offsets, B, i > 0, RAGGED)
    o_after = position(t_after, row, offsets, step, stride, RAGGED)
    pass_on = m_after
    if HAS_RESET:
        pass_on = tl.load(reset + o_after, mask=m_after, other=1) == 0
    return m_after, o_after, pass_on


@triton.jit
def read_backward(
    given, times, row, i_row, rows, o_u, i, d, sizes, H: tl.constexpr, D: tl.constexpr, FLAGS: tl.constexpr
):
    """All that a step needs but what other programs compute.

    ``given``: the kernel's (gates, cells, c_0, dc, dy, dh_n, dcells, reset, offsets), the first two of the direction.
    Returns (positions (BT,), rows that have the step, entries (BT, U) that do, (i, f, g, o, c, c_before, dc, dh),
    the rows (BT,) in which a gradient goes on to the step before).
    """
    gates, cells, c_0, dc, dy, dh_n, dcells, reset, offsets = given
    t, t_after, t_before = times
    T, B, _, step, stride = sizes
    HAS_DY: tl.constexpr = FLAGS[0]
    HAS_DH_N: tl.constexpr = FLAGS[1]
    HAS_DCELLS: tl.constexpr = FLAGS[2]
    HAS_C_0: tl.constexpr = FLAGS[3]
    HAS_RESET: tl.constexpr = FLAGS[4]
    RAGGED: tl.constexpr = FLAGS[5]
    o_t, m_row, m, four = own_entries(gates, t, row, i_row, rows, o_u, offsets, sizes, H, RAGGED)
    i_t, f_t, g_t, o_gate = four
    c_t = tl.load(cells + o_t[:, None] * H + o_u, mask=m, other=0.0)
    m_before = m_row & active(t_before, row, offsets, B, i < T - 1, RAGGED)
    o_before = position(t_before, row, offsets, step, stride, RAGGED)
    c_before = tl.load(cells + o_before[:, None] * H + o_u, mask=m & m_before[:, None], other=0.0)
    o_state = (d * B + row[:, None]) * H + o_u
    if HAS_C_0:
        starts = m & (m_before == 0)[:, None]
        c_before = tl.where(starts, tl.load(c_0 + o_state, mask=starts, other=0.0).to(tl.float32), c_before)
    keep = m_row
    if HAS_RESET:
        keep = tl.load(reset + o_t, mask=m_row, other=1) == 0
        c_before = tl.where(keep[:, None], c_before, 0.0)
    dc_t = tl.load(dc + o_state, mask=m, other=0.0)
    if HAS_DCELLS:
        dc_t += tl.load(dcells + (o_t * (D * H) + d * H)[:, None] + o_u, mask=m, other=0.0)
    dh = tl.zeros(dc_t.shape, tl.float32)
    if HAS_DY:
        dh += tl.load(dy + (o_t * (D * H) + d * H)[:, None] + o_u, mask=m, other=0.0).to(tl.float32)
    if HAS_DH_N:
        ends = m & ((m_row & active(t_after, row, offsets, B, i > 0, RAGGED)) == 0)[:, None]
        dh += tl.load(dh_n + o_state, mask=ends, other=0.0).to(tl.float32)
    return o_t, m_row, m, (i_t, f_t, g_t, o_gate, c_t, c_before, dc_t, dh), keep


@triton.jit
def write_backward(
    dz, dc, norms, step_read, dh_after, t, row, o_u, d, part, sizes,
    H: tl.constexpr, NORMS: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The cell's gradients, once ``dh_after`` (BT, U), the part of dh from the step after, has arrived.

    ``step_read``: what :func:`read_backward` returns.  ``part``: (this slice of all directions, how many there are).
    """
    o_t, m_row, m, cell, keep = step_read
    i_t, f_t, g_t, o_gate, c_t, c_before, dc_t, dh = cell
    T, B, _, _, _ = sizes
    dh += dh_after
    dz_i, dz_f, dz_g, dz_o, dc_t, dc_before = backward_step(dc_t, dh, i_t, f_t, g_t, o_gate, c_t, c_before, DTYPE)
    if NORMS:
        store_norms(norms, part[0], part[1], t, row, dh, dc_t, m, m_row, T, B)
    dz_i, dz_f = to_bits(dz_i, DTYPE, BITS), to_bits(dz_f, DTYPE, BITS)
    dz_g, dz_o = to_bits(dz_g, DTYPE, BITS), to_bits(dz_o, DTYPE, BITS)
    store_gates(dz, o_t[:, None], o_u, dz_i, dz_f, dz_g, dz_o, m, H)
    dc_before = tl.where(keep[:, None], dc_before, 0.0)
    tl.store(dc + (d * B + row[:, None]) * H + o_u, dc_before, mask=m)
