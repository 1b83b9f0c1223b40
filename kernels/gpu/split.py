"""The Triton design for hidden sizes whose recurrent weights need several CTAs: units split over a group of them.

Forward, in one program: four gates of U units, for the rows of its group.  Its slice of W_hh stays in registers for
all T steps.  A step needs all of h_{t-1}, which the group's programs exchange through the second-level
cache: the output is the channel and its data the flag (``receive``), one trip per step.  Backward is the same with dz,
of which a step needs all 4H, and with the slice of W_hh that leads from there to U units of dh.

    grid: D x groups x slices; a group has ``tiles`` tiles of ``rows`` rows (at most BT), a slice U units

The programs of a group wait for each other, so all must be resident at once: a cooperative launch.  If that is not
possible, the steps (``begin`` to ``end``) are launched one at a time, and no program waits for another.  The cell state
is in memory between steps (read before the wait, so that costs nothing), which works for both ways of launching.

**Weights in registers.**  A batched product splits K over the warps (KW slices): each warp multiplies its own slice of
the weights, and the chain of dependent instructions is K / (16 KW) long.  The loops over steps and tiles are ``while``
loops on purpose: into a ``for`` loop Triton (3.6 to 3.9) sinks the loading of dot operands from shared memory, and all
weights are read again in every step, 128 KiB at 128 bytes per clock, 0.55 microseconds; out of a ``while`` loop it
hoists them, and they stay in registers.  STREAM is for slices larger than the register file: the weights are read from
the second-level cache in every step, K terms at a time.

What was tried, and the time of a step with it, is in docs/notes/gpu-tuning.md.  Masks of the channel have to compare
words, not entries: ``2 k < H`` hides from Triton that neighbours share a mask, and every load becomes four bytes wide.

**Channel.**  It is read as 32-bit words, two 16-bit entries in each (``missing_in`` says why), 16 bytes per load; so a
row of h has H' entries, H rounded up to a multiple of eight, and the host copies them if that is not H.

**K.**  A row of h or dz is received in chunks of K terms, a power of two; the next one is requested before the
current one is waited for.  Without STREAM there are NK of them, unrolled: 768 = 3 x 256, 3072 = 3 x 1024, no waste.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    collect,
    jitter,
    position,
    prefetch_gates,
    product_of_words,
    receive,
    start_votes,
    tile_row,
    to_bits,
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

SIZES = [
    "T",
    "B",
    "N",
    "begin",
    "end",
    "groups",
    "tiles",
    "rows",
    "patience",
    "entered",
    "step",
    "stride",
]  # one kernel for all of their values


@triton.jit
def load_gate_rows(w_words, first, k, H: tl.constexpr, H_ROW: tl.constexpr, U: tl.constexpr, PACK: tl.constexpr):
    """(KW, 4U, KS): from W_hh (4H, H') in words, the rows of the gates of U units, the words ``k`` of each."""
    row, unit = tile_row(tl.arange(0, 4 * U), first, H)
    p = w_words + row[None, :, None].to(tl.int64) * (H_ROW // PACK) + k
    return tl.load(p, mask=(unit < H)[None, :, None] & (k < H_ROW // PACK), other=0)


@triton.jit
def unpack(words, PACK: tl.constexpr, DTYPE: tl.constexpr):
    """The PACK values in each word, a tuple of tensors: if two, the even ones and the odd ones."""
    if PACK == 1:
        return (words.to(DTYPE, bitcast=True),)
    else:
        return words.to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def load_unit_columns(w_hh, first, k, H: tl.constexpr, U: tl.constexpr, PACK: tl.constexpr):
    """From the transpose of W_hh (4H, H): the columns of U units, the rows PACK k (and PACK k + 1).

    A tuple of (KW, U, KS), as ``unpack`` returns it.
    """
    unit = (first + tl.arange(0, U))[None, :, None]
    p = w_hh + (PACK * k).to(tl.int64) * H + unit
    mask = (unit < H) & (PACK * k < 4 * H)
    even = tl.load(p, mask=mask, other=0.0)
    if PACK == 1:
        return (even,)
    else:
        return even, tl.load(p + H, mask=mask, other=0.0)


@triton.jit
def channel(words, k, o_row, m_row, terms: tl.constexpr, PACK: tl.constexpr):
    """Addresses and mask of (KW, KS, BT) words of h or dz.

    k (KW, KS, 1): which words of a row of ``terms`` entries; o_row (BT,): the first word of each row; m_row: which rows
    exist.
    """
    return words + o_row[None, None, :] + k, (k < (terms + PACK - 1) // PACK) & m_row[None, None, :]


@triton.jit
def received(
    w,
    words_of,
    k,
    o_row,
    m_row,
    keep,
    acc,
    patience,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(acc + w times the rows of the channel at ``o_row``, whether a wait gave up): NK chunks, each requested early.

    CHUNKS: terms of a row, words of a chunk, NK, entries of a word.  ``keep``: the rows that do not count as zero.
    """
    TERMS: tl.constexpr = CHUNKS[0]
    WORDS: tl.constexpr = CHUNKS[1]
    NK: tl.constexpr = CHUNKS[2]
    PACK: tl.constexpr = CHUNKS[3]
    missing = 0
    p, m_k = channel(words_of, k, o_row, m_row, TERMS, PACK)
    words = tl.load(p, mask=m_k, other=0, volatile=True)
    for j in tl.static_range(NK):
        if j + 1 < NK:
            p_next, m_next = channel(words_of, (j + 1) * WORDS + k, o_row, m_row, TERMS, PACK)
            words_next = tl.load(p_next, mask=m_next, other=0, volatile=True)
        words, lost = receive(words, p, m_k, patience, PACK)
        acc = product_of_words(w[j], words, keep, acc, PACK, DTYPE, PRECISION)
        missing = tl.maximum(missing, lost)
        if j + 1 < NK:
            words, p, m_k = words_next, p_next, m_next
    return acc, missing


@triton.jit(do_not_specialize=SIZES)
def lstm_fwd_kernel(
    h,  # (N, D * H'), as integers of its size: the output, and the channel; filled with -1
    h_words,  # the same memory, as int32
    gates,  # (D, N, 4H): z without its recurrent part; where SAVE is set, the activated gates on return
    cells,  # (D, N, H), float32: every c_t, where SAVE is set
    c,  # (D, B, H), float32: c_0 on entry, c_n on return
    status,  # (1,) int32: set to 1 when a wait gave up
    w_words,  # (D, 4H, H'), as int32: W_hh
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
    H_ROW: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    K: tl.constexpr,
    NK: tl.constexpr,
    STREAM: tl.constexpr,
    AHEAD: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    JITTER: tl.constexpr,
):
    """Steps ``begin`` to ``end`` of the walk through time, for U units and ``tiles`` x ``rows`` rows."""
    patience = start_votes(patience)
    slices: tl.constexpr = (H + U - 1) // U
    i_slice = tl.program_id(0) % slices
    i_group = tl.program_id(0) // slices % groups
    d = (tl.program_id(0) // slices // groups).to(tl.int64)
    N = N.to(tl.int64)
    first = i_slice * U
    h += d * H_ROW
    gates += d * N * 4 * H
    cells += d * N * H

    o_u = (first + tl.arange(0, U))[None, :]
    i_row = tl.arange(0, BT)
    k_w = tl.arange(0, KW)[:, None, None]
    PACK: tl.constexpr = 32 // BITS.primitive_bitwidth  # entries of a word
    WORDS: tl.constexpr = K // PACK  # of a chunk
    KS: tl.constexpr = WORDS // KW
    w_words += d * 4 * H * (H_ROW // PACK)
    k_left = k_w * KS + tl.arange(0, KS)[None, None, :]
    k = k_w * KS + tl.arange(0, KS)[None, :, None]
    w = ()
    for j in tl.static_range(1 if STREAM else NK):
        w_j = load_gate_rows(w_words, first, j * WORDS + k_left, H, H_ROW, U, PACK)
        w = w + (w_j if STREAM else unpack(w_j, PACK, DTYPE),)

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
            row = (i_group * tiles + i_tile) * rows + i_row
            # everything that does not depend on h_{t-1}, while that is on its way
            o_t, m, entering, p_c, keep, m_before = read_forward(
                given, (t, t_before), row, i_row, rows, o_u, i, d, sizes, H, flags
            )  # fmt: skip
            if AHEAD > 0:
                t_ahead = tl.where(d == 0, t + AHEAD, t - AHEAD)
                prefetch_gates(gates, t_ahead, row, first, sizes, offsets, H, RAGGED)
            o_before = position(t_before, row, offsets, step, stride, RAGGED)
            o_before = o_before * (D * H_ROW // PACK) + d * (H_ROW // PACK)
            acc = tl.zeros((KW, 4 * U, BT), tl.float32)
            missing = 0
            if STREAM:
                p, m_k = channel(h_words, k, o_before, m_before, H_ROW, PACK)
                words = tl.load(p, mask=m_k, other=0, volatile=True)
                done = 0
                w_k = w[0]
                while done < H_ROW // PACK:
                    done += WORDS
                    p_next, m_next = channel(h_words, done + k, o_before, m_before, H_ROW, PACK)
                    words_next = tl.load(p_next, mask=m_next, other=0, volatile=True)
                    w_next = load_gate_rows(w_words, first, done + k_left, H, H_ROW, U, PACK)
                    words, lost = receive(words, p, m_k, patience, PACK)
                    acc = product_of_words(unpack(w_k, PACK, DTYPE), words, keep, acc, PACK, DTYPE, PRECISION)
                    missing = tl.maximum(missing, lost)
                    words, p, m_k, w_k = words_next, p_next, m_next, w_next
            else:
                chunks: tl.constexpr = (H_ROW, WORDS, NK, PACK)
                acc, missing = received(
                    w, h_words, k, o_before, m_before, keep, acc, patience, chunks, DTYPE, PRECISION
                )  # fmt: skip
            if missing > 0:
                tl.store(status, 1)
                patience = 0  # a program that is still missing will not arrive: stop soon, with NaN for its data

            recurrent = collect(acc, KW, 4, U, BT, 32 * KW)
            i_t, f_t, g_t, o_gate, c_t, h_t = forward_cell(entering, recurrent, m_before, entered, DTYPE)
            tl.store(h + o_t[:, None] * (D * H_ROW) + o_u, to_bits(h_t, DTYPE, BITS), mask=m)
            write_forward(gates, cells, p_c, o_t, o_u, m, (i_t, f_t, g_t, o_gate, c_t), H, SAVE, DTYPE)
            i_tile += 1
        tl.debug_barrier()  # c is read by other threads than those that wrote it
        i += 1


@triton.jit(do_not_specialize=SIZES)
def lstm_bwd_kernel(
    dz,  # (D, N, 4H), as integers of its size: the gradient before the activations; the channel; filled with -1
    dz_words,  # the same memory, as int32
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
    step,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,
    KW: tl.constexpr,
    K: tl.constexpr,
    NK: tl.constexpr,
    STREAM: tl.constexpr,
    AHEAD: tl.constexpr,
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
    patience = start_votes(patience)
    slices: tl.constexpr = (H + U - 1) // U
    i_slice = tl.program_id(0) % slices
    i_group = tl.program_id(0) // slices % groups
    d = (tl.program_id(0) // slices // groups).to(tl.int64)
    N = N.to(tl.int64)
    first = i_slice * U
    dz += d * N * 4 * H
    gates += d * N * 4 * H
    cells += d * N * H
    w_hh += d * 4 * H * H

    o_u = (first + tl.arange(0, U))[None, :]
    i_row = tl.arange(0, BT)
    k_w = tl.arange(0, KW)[:, None, None]
    PACK: tl.constexpr = 32 // BITS.primitive_bitwidth  # entries of a word
    WORDS: tl.constexpr = K // PACK  # of a chunk
    KS: tl.constexpr = WORDS // KW
    k_left = k_w * KS + tl.arange(0, KS)[None, None, :]
    k = k_w * KS + tl.arange(0, KS)[None, :, None]
    w = ()
    for j in tl.static_range(1 if STREAM else NK):
        w = w + (load_unit_columns(w_hh, first, j * WORDS + k_left, H, U, PACK),)

    flags: tl.constexpr = (HAS_DY, HAS_DH_N, HAS_DCELLS, HAS_C_0, HAS_RESET, RAGGED)
    given = (gates, cells, c_0, dc, dy, dh_n, dcells, reset, offsets)
    sizes = (T, B, N, step, stride)
    i = begin
    while i < end:
        times = backward_times(i, d, T)
        if JITTER > 0:
            i += jitter(tl.program_id(0), i, patience, JITTER) * 0
        i_tile = 0
        while i_tile < tiles:
            row = (i_group * tiles + i_tile) * rows + i_row
            # everything that does not depend on dz of the next step, while that is on its way
            step_read = read_backward(given, times, row, i_row, rows, o_u, i, d, sizes, H, D, flags)
            if AHEAD > 0:
                t_ahead = tl.where(d == 0, times[0] - AHEAD, times[0] + AHEAD)
                prefetch_gates(gates, t_ahead, row, first, sizes, offsets, H, RAGGED)
            m_after, o_after, pass_on = arriving(times[1], row, step_read[1], reset, offsets, i, sizes, flags)
            o_after = (d * N + o_after) * (4 * H // PACK)
            acc = tl.zeros((KW, U, BT), tl.float32)
            missing = 0
            if STREAM:
                p, m_k = channel(dz_words, k, o_after, m_after, 4 * H, PACK)
                words = tl.load(p, mask=m_k, other=0, volatile=True)
                done = 0
                w_k = w[0]
                while done < 4 * H // PACK:
                    done += WORDS
                    p_next, m_next = channel(dz_words, done + k, o_after, m_after, 4 * H, PACK)
                    words_next = tl.load(p_next, mask=m_next, other=0, volatile=True)
                    w_next = load_unit_columns(w_hh, first, done + k_left, H, U, PACK)
                    words, lost = receive(words, p, m_k, patience, PACK)
                    acc = product_of_words(w_k, words, pass_on, acc, PACK, DTYPE, PRECISION)
                    missing = tl.maximum(missing, lost)
                    words, p, m_k, w_k = words_next, p_next, m_next, w_next
            else:
                chunks: tl.constexpr = (4 * H, WORDS, NK, PACK)
                acc, missing = received(
                    w, dz_words, k, o_after, m_after, pass_on, acc, patience, chunks, DTYPE, PRECISION
                )  # fmt: skip
            if missing > 0:
                tl.store(status, 1)
                patience = 0  # a program that is still missing will not arrive: stop soon, with NaN for its data
            dh_after = collect(acc, KW, 1, U, BT, 32 * KW)[0]
            part = (d * slices + i_slice, D * slices)
            write_backward(
                dz, dc, norms, step_read, dh_after, times[0], row, o_u, d, part, sizes, H, NORMS, DTYPE, BITS
            )
            i_tile += 1
        tl.debug_barrier()  # dc is read by other threads than those that wrote it
        i += 1
