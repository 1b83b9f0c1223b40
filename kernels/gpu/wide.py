"""The Triton design for many rows: tiles of 16 to 64, which Hopper's tensor cores multiply from shared memory.

Units are split over the programs of a group as in ``split.py``: each has U of them.  Its weights stay on the SM for
all steps, as the left operand of one product (wgmma): 128 rows of them, in K chunks, HELD of these in registers and
the others in shared memory (where Triton leaves an operand that was loaded outside of a ``while`` loop).

    grid: D x groups x slices; a group has ``tiles`` tiles of ``rows`` rows (at most BT)

Forward: 128 rows are the gates of U = 32 units, and h is read whole.  Backward is divided in both dimensions, because
dz is four times as wide: a program multiplies the dz of PU units, one of PARTS parts, by the weights that lead to 128
units, and the owner of a unit adds the PARTS sums in their order.  So a step of a program reads rows x 4 PU terms and
rows x PARTS x U sums; undivided it would read rows x 4H terms.  Sums are kept for two steps: who writes one has
received what their readers wrote after they had read those of the step before last.

**Hand-off** by counters: a program writes its part of a tile, and adds one (release); who reads it waits until all
have (acquire), and reads ordinary memory, 16 bytes at a time and without looking for what is missing.  That takes
longer than data that are their own flag, but less for each byte: with 128 rows of H 1024 it is faster.

The programs of a group wait for each other: a cooperative launch, or one for each step, in backward for each phase of
a step.  What was tried, and the time of a step with it, is in docs/notes/gpu-tuning.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    INTERPRETED,
    collect,
    jitter,
    position,
    product,
    tile_row,
)
from .steps import (
    arriving,
    backward_times,
    forward_cell,
    forward_times,
    read_backward,
    read_forward,
    write_backward,
    write_forward,
)

# one kernel for all of their values
SIZES = ["T", "B", "N", "begin", "end", "groups", "tiles", "rows", "patience", "entered", "phases", "step", "stride"]
MULTIPLY, FINISH = 1, 2  # the phases of a step of backward


@triton.jit
def in_registers(w):
    """``w``; an operand that was computed stays in registers, where one that was only loaded goes to shared memory."""
    if INTERPRETED:
        return w
    else:
        return w + 0.0


@triton.jit
def acquire(p):
    """The int32 at ``p``, a scalar; what was written before it was counted is visible to the thread from here on."""
    if INTERPRETED:
        return tl.load(p, volatile=True)
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait(p, target, patience):
    """Polls the counter at ``p`` until it has come to ``target``; above 0 if ``patience`` tries were not enough.

    Each thread asks for itself: so each has acquired what was written, without a barrier.
    """
    seen = acquire(p)
    tries = patience
    while (seen < target) & (tries > 0):
        seen = acquire(p)
        tries -= 1
    return (seen < target).to(tl.int32)


@triton.jit
def count(p):
    """Adds one to the counter at ``p``, after everything that the program has written."""
    tl.debug_barrier()
    tl.atomic_add(p, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=SIZES)
def lstm_fwd_kernel(
    h,  # (N, D * H): the output
    gates,  # (D, N, 4H): z without its recurrent part; where SAVE is set, the activated gates on return
    cells,  # (D, N, H), float32: every c_t, where SAVE is set
    c,  # (D, B, H), float32: c_0 on entry, c_n on return
    counts,  # (D, T, groups * tiles) int32, zero: how many programs have written h
    status,  # (1,) int32: set to 1 when a wait gave up
    w_hh,  # (D, 4H, H)
    reset,  # N int32, where HAS_RESET is set
    offsets,  # (T + 1,) int64, where RAGGED is set
    T,
    B,
    N,
    begin,
    end,
    groups,
    tiles,
    rows,
    patience,
    entered,  # 1: z of each row's first step has W_hh h_0 already
    step,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    K: tl.constexpr,
    NK: tl.constexpr,
    HELD: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    JITTER: tl.constexpr,
):
    """Steps ``begin`` to ``end`` of the walk through time, for U units and ``tiles`` x ``rows`` rows."""
    slices: tl.constexpr = (H + U - 1) // U
    i_slice = tl.program_id(0) % slices
    i_group = tl.program_id(0) // slices % groups
    d = (tl.program_id(0) // slices // groups).to(tl.int64)
    N = N.to(tl.int64)
    first = i_slice * U
    h += d * H
    gates += d * N * 4 * H
    cells += d * N * H
    w_hh += d * 4 * H * H
    counts += d * T * (groups * tiles)

    o_u = (first + tl.arange(0, U))[None, :]
    i_row = tl.arange(0, BT)
    o_k = tl.arange(0, K)[None, :]
    w_row, w_unit = tile_row(tl.arange(0, 4 * U), first, H)
    p_w = w_hh + w_row[:, None].to(tl.int64) * H + o_k
    w = ()
    for j in tl.static_range(NK):
        w_j = tl.load(p_w + j * K, mask=(w_unit < H)[:, None] & (j * K + o_k < H), other=0.0)
        if j < HELD:
            w_j = in_registers(w_j)
        w = w + (w_j,)

    flags: tl.constexpr = (HAS_RESET, RAGGED)
    given = (gates, c, reset, offsets)
    sizes = (T, B, N, step, stride)
    i = begin
    while i < end:
        t, t_before = forward_times(i, d, T)
        if JITTER > 0:
            i += jitter(tl.program_id(0), i, patience, JITTER) * 0
        i_tile = 0
        while i_tile < tiles:
            i_rows = i_group * tiles + i_tile
            row = i_rows * rows + i_row
            # everything that does not depend on h_{t-1}, while that is on its way
            o_t, m, entering, p_c, keep, m_before = read_forward(
                given, (t, t_before), row, i_row, rows, o_u, i, d, sizes, H, flags
            )  # fmt: skip
            missing = 0
            if i > 0:
                missing = wait(counts + t_before * (groups * tiles) + i_rows, slices, patience)
            if missing > 0:
                tl.store(status, 1)
                patience = 0  # a program that is still missing will not arrive: stop soon, with NaN for its data
            p_h = h + position(t_before, row, offsets, step, stride, RAGGED)[:, None] * (D * H) + o_k
            m_h = (m_before & keep)[:, None]
            acc = tl.zeros((4 * U, BT), tl.float32)
            h_j = tl.load(p_h, mask=m_h & (o_k < H), other=0.0)
            for j in tl.static_range(NK):
                if j + 1 < NK:
                    h_next = tl.load(p_h + (j + 1) * K, mask=m_h & ((j + 1) * K + o_k < H), other=0.0)
                acc = product(w[j], tl.trans(h_j), acc, PRECISION)
                if j + 1 < NK:
                    h_j = h_next

            recurrent = collect(tl.reshape(acc, (1, 4 * U, BT)), 1, 4, U, BT, 32 * KW)
            z_i, z_f, z_g, z_o, c_before = entering
            entering = (z_i, z_f, z_g, z_o, c_before + tl.where(missing > 0, float("nan"), 0.0))
            i_t, f_t, g_t, o_gate, c_t, h_t = forward_cell(entering, recurrent, m_before, entered, DTYPE)
            tl.store(h + o_t[:, None] * (D * H) + o_u, h_t.to(DTYPE), mask=m)
            count(counts + t * (groups * tiles) + i_rows)
            write_forward(gates, cells, p_c, o_t, o_u, m, (i_t, f_t, g_t, o_gate, c_t), H, SAVE, DTYPE)
            i_tile += 1
        tl.debug_barrier()  # c is read by other threads than those that wrote it
        i += 1


@triton.jit(do_not_specialize=SIZES)
def lstm_bwd_kernel(
    dz,  # (D, N, 4H), as integers of its size: the gradient before the activations
    sums,  # (D, 2, PARTS, B, H), float32: sums of dh over parts of the terms, of two steps
    counts,  # (D, T, groups * tiles, PARTS + BLOCKS) int32, zero: how many programs have written dz, and sums
    dc,  # (D, B, H), float32: the gradient of c_n on entry, that of c_0 on return
    norms,  # (2, D, slices, T, B), float64: sums of squares over the units of a slice, where NORMS is set
    status,  # (1,) int32: set to 1 when a wait gave up
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
    begin,
    end,
    groups,
    tiles,
    rows,
    patience,
    phases,  # MULTIPLY, FINISH or both
    step,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    K: tl.constexpr,
    NK: tl.constexpr,
    HELD: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DH_N: tl.constexpr,
    HAS_DCELLS: tl.constexpr,
    HAS_C_0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RAGGED: tl.constexpr,
    NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    JITTER: tl.constexpr,
):
    """Steps ``begin`` to ``end`` of the walk back through time, for U units and ``tiles`` x ``rows`` rows."""
    M: tl.constexpr = U * PARTS  # units that a program's sums are of
    PU: tl.constexpr = NK * K // 4
    BLOCKS: tl.constexpr = (H + M - 1) // M
    slices: tl.constexpr = PARTS * BLOCKS  # the last ones may have no unit
    i_slice = tl.program_id(0) % slices
    i_group = tl.program_id(0) // slices % groups
    d = (tl.program_id(0) // slices // groups).to(tl.int64)
    N = N.to(tl.int64)
    dz += d * N * 4 * H
    gates += d * N * 4 * H
    cells += d * N * H
    w_hh += d * 4 * H * H
    sums += d * 2 * PARTS * B * H
    counts += d * T * (groups * tiles) * (PARTS + BLOCKS)

    part, block = i_slice // BLOCKS, i_slice % BLOCKS  # what it multiplies
    writers = tl.minimum(slices - part * (PU // U), PU // U)  # of the dz of this part
    o_u = (i_slice * U + tl.arange(0, U))[None, :]
    o_m = block * M + tl.arange(0, M)
    i_row = tl.arange(0, BT)
    w = ()
    o_k = ()
    m_k = ()
    for j in tl.static_range(NK):
        unit = part * PU + j * K % PU + tl.arange(0, K)
        o_j = j * K // PU * H + unit  # of a row of dz
        m_w = (unit < H)[:, None] & (o_m < H)[None, :]
        w_j = tl.load(w_hh + o_j[:, None].to(tl.int64) * H + o_m[None, :], mask=m_w, other=0.0)
        if j < HELD:
            w_j = in_registers(w_j)
        w = w + (tl.trans(w_j),)
        o_k = o_k + (o_j[None, :],)
        m_k = m_k + ((unit < H)[None, :],)

    flags: tl.constexpr = (HAS_DY, HAS_DH_N, HAS_DCELLS, HAS_C_0, HAS_RESET, RAGGED)
    given = (gates, cells, c_0, dc, dy, dh_n, dcells, reset, offsets)
    sizes = (T, B, N, step, stride)
    i = begin
    while i < end:
        times = backward_times(i, d, T)
        sums_t = sums + (i % 2).to(tl.int64) * (PARTS * B * H)
        if JITTER > 0:
            i += jitter(tl.program_id(0), i, patience, JITTER) * 0
        i_tile = 0
        while i_tile < tl.where((i > 0) & (phases % 2 == 1), tiles, 0):
            i_rows = i_group * tiles + i_tile
            row = i_rows * rows + i_row
            exists = (i_row < rows) & (row < B)
            written = counts + (times[1] * (groups * tiles) + i_rows) * (PARTS + BLOCKS) + part
            missing = wait(written, writers, patience)
            if missing > 0:
                tl.store(status, 1)
                patience = 0  # a program that is still missing will not arrive: stop soon, with NaN for its data
            _, o_after, pass_on = arriving(times[1], row, exists, reset, offsets, i, sizes, flags)
            p = dz + o_after[:, None] * (4 * H)
            acc = tl.zeros((M, BT), tl.float32)
            terms = tl.load(p + o_k[0], mask=pass_on[:, None] & m_k[0], other=0)
            for j in tl.static_range(NK):
                if j + 1 < NK:
                    terms_next = tl.load(p + o_k[j + 1], mask=pass_on[:, None] & m_k[j + 1], other=0)
                acc = product(w[j], tl.trans(terms.to(DTYPE, bitcast=True)), acc, PRECISION)
                if j + 1 < NK:
                    terms = terms_next
            acc += tl.where(missing > 0, float("nan"), 0.0)
            p_out = sums_t + (part * B + row[:, None]).to(tl.int64) * H + o_m[None, :]
            tl.store(p_out, tl.trans(acc), mask=exists[:, None] & (o_m < H)[None, :])
            count(counts + (times[0] * (groups * tiles) + i_rows) * (PARTS + BLOCKS) + PARTS + block)
            i_tile += 1
        i_tile = 0
        while i_tile < tl.where(phases >= 2, tiles, 0):
            i_rows = i_group * tiles + i_tile
            row = i_rows * rows + i_row
            counts_t = counts + (times[0] * (groups * tiles) + i_rows) * (PARTS + BLOCKS)
            # everything that does not depend on the sums, while these are on their way
            step_read = read_backward(given, times, row, i_row, rows, o_u, i, d, sizes, H, D, flags)
            dh_after = tl.zeros((BT, U), tl.float32)
            if i > 0:
                missing = wait(counts_t + PARTS + i_slice // PARTS, PARTS, patience)
                if missing > 0:
                    tl.store(status, 1)
                    patience = 0
                dh_after += tl.where(missing > 0, float("nan"), 0.0)
                for q in tl.static_range(PARTS):  # not kept in the first-level cache: each is read once
                    p_q = sums_t + (q * B + row[:, None]).to(tl.int64) * H + o_u
                    dh_after += tl.load(p_q, mask=step_read[2], other=0.0, cache_modifier=".cg")
            part_of = (d * slices + i_slice, D * slices)
            write_backward(
                dz, dc, norms, step_read, dh_after, times[0], row, o_u, d, part_of, sizes, H, NORMS, DTYPE, BITS
            )
            count(counts_t + i_slice // (PU // U))
            i_tile += 1
        tl.debug_barrier()  # dc is read by other threads than those that wrote it
        i += 1
