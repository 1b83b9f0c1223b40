"""Device functions that the Triton kernels of all designs share.

Legend of every kernel: T time, B batch, N tokens: (step, row) pairs, H hidden, D directions; in one program (CTA)
U units of H, BT rows of B, K terms of a sum, KW slices of K (one per warp), KS terms of a slice.  The weights are the
left operand of the tensor cores, (gates or units, terms), and h or dz the right one, (terms, rows): the 16 rows of an
instruction suit gates, its 8 columns a batch, so that eight rows of a batch are a full tile.  All else is
(rows, units), as in memory.

**Order of gates in a tile.**  A tile's 4U rows of weights are groups of 32: eight units' i, then their f, g, o.  In
the accumulator of an m16n8 instruction a thread then holds all four gates of the same units, so taking the gates
apart (``collect``) moves nothing between threads.

**Tokens.**  (t, row) is at ``position``: ``t * step + row * stride`` if the batch is dense, ``offsets[t] + row`` if
rows are packed; every tensor of a call has this order, times its width.  Positions have 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .. import cell

# Under the interpreter a product takes float32 operands: its bfloat16 is not reliable.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

# (Under the interpreter these have to be plain functions.)
_jit = (lambda function: function) if INTERPRETED.value else triton.jit
cell_state = _jit(cell.cell_state)
hidden_state = _jit(cell.hidden_state)
cell_grad = _jit(cell.cell_grad)
gate_grads = _jit(cell.gate_grads)
cell_grad_prev = _jit(cell.cell_grad_prev)


@triton.jit
def exp2_approx(x):
    """2^x in one instruction, within 2 roundings of float32; results below 2^-126 are 0."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_approx(x):
    """1 / x in one instruction, within a rounding of float32; 0 for infinity."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, DTYPE: tl.constexpr):
    """1 / (1 + exp(-x)): saturates to 0 and 1, NaN stays NaN.

    For 16-bit calls without exact subnormal numbers, which would double the instructions of a step of the resident
    design; the error is still that of float32, because a forget gate of 0.9999 has to differ from 1.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return reciprocal_approx(1.0 + exp2_approx(-1.4426950408889634 * x))


@triton.jit
def tanh(x, DTYPE: tl.constexpr):
    """tanh(x); for float32 to a few roundings: 1 - 2 / (exp(2|x|) + 1), and a series where that would cancel.

    The series is that of tanh up to x^11; at |x| = 0.35 its error is below 1e-7 of the value.  float16 does not need
    it: without, the error is 2e-7, less than four times the distance of its smallest numbers.  For bfloat16 there
    is an instruction, with a relative error of 2^-11, a quarter of a rounding.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        a = tl.abs(x)
        large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
        s = x * x
        series = 1.0 + s * (
            -0.3333333333 + s * (0.1333333333 + s * (-0.0539682540 + s * (0.0218694885 - s * 0.0088632355)))
        )
        return tl.where(a < 0.35, x * series, tl.where(x < 0.0, -large, large))
    elif tl.float16 == DTYPE:
        return 1.0 - 2.0 * reciprocal_approx(1.0 + exp2_approx(2.8853900817779268 * x))
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b over the last two dimensions; ``PRECISION`` applies to float32 operands only."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_row(m, first, H: tl.constexpr):
    """The row of a (4H, ·) tensor that row ``m`` of a tile holds, and its unit, which may be beyond H."""
    unit = first + (m // 32) * 8 + m % 8
    return (m // 8) % 4 * H + unit, unit


@triton.jit
def collect(acc, PARTS: tl.constexpr, GATES: tl.constexpr, U: tl.constexpr, BT: tl.constexpr, THREADS: tl.constexpr):
    """The sum over PARTS of (PARTS, GATES U, BT), rows in a tile's order; a tuple of GATES tensors (BT, U).

    One exchange through shared memory, after which a thread has all slices and all gates of its entries, in the layout
    of loads and stores of (BT, U).  ``tl.sum`` across warps instead leaves a copy with every warp, a layout that
    Triton keeps for all arithmetic that follows: eight times the work and the registers (340 spills in the resident
    backward), and a shuffle for each step of each sum.  The exchange is forced by a scan over an axis of one, whose
    only effect is to start from the default layout.
    """
    E: tl.constexpr = (BT * U // THREADS) if BT * U > THREADS else 1  # neighbours in a row, of one thread
    if GATES == 4:
        acc = tl.permute(tl.reshape(acc, (PARTS, U // 8, 4, 8, BT)), (0, 2, 4, 1, 3))
    else:
        acc = tl.permute(acc, (0, 2, 1))
    acc = tl.permute(tl.reshape(acc, (PARTS * GATES, BT, U // E, E)), (0, 3, 1, 2))
    acc = tl.cumsum(tl.reshape(acc, (1, PARTS * GATES * E, BT * U // E)), 0)
    total = tl.sum(tl.reshape(acc, (PARTS, GATES * E, BT * U // E)), 0)
    total = tl.reshape(tl.permute(tl.reshape(total, (GATES, E, BT, U // E)), (0, 2, 3, 1)), (GATES, BT, U))
    if GATES == 4:
        first, second = tl.split(tl.permute(tl.reshape(total, (2, 2, BT, U)), (2, 3, 0, 1)))  # i and g, f and o
        i, g = tl.split(first)
        f, o = tl.split(second)
        return i, f, g, o
    else:
        return (tl.reshape(total, (BT, U)),)


@triton.jit
def gates_to(i, f, g, o, U: tl.constexpr, BT: tl.constexpr):
    """(4U, BT) in a tile's order from i, f, g, o, each (BT, U)."""
    z = tl.join(tl.join(i, g), tl.join(f, o))  # (BT, U, 2, 2)
    z = tl.reshape(z, (BT, U // 8, 8, 2, 2))
    return tl.reshape(tl.permute(z, (1, 3, 4, 2, 0)), (4 * U, BT))


@triton.jit
def load_gates(gates, o_t, o_u, m, H: tl.constexpr):
    """i, f, g and o (BT, U) of a step, or their z, from (N, 4H); ``o_t`` (BT, 1): the positions of its rows."""
    p = gates + o_t * (4 * H) + o_u
    return (
        tl.load(p, mask=m, other=0.0),
        tl.load(p + H, mask=m, other=0.0),
        tl.load(p + 2 * H, mask=m, other=0.0),
        tl.load(p + 3 * H, mask=m, other=0.0),
    )


@triton.jit
def store_gates(gates, o_t, o_u, i, f, g, o, m, H: tl.constexpr):
    """The inverse of ``load_gates``, for gates or their gradients."""
    p = gates + o_t * (4 * H) + o_u
    tl.store(p, i, mask=m)
    tl.store(p + H, f, mask=m)
    tl.store(p + 2 * H, g, mask=m)
    tl.store(p + 3 * H, o, mask=m)


@triton.jit
def forward_step(z_i, z_f, z_g, z_o, r_i, r_f, r_g, r_o, m_r, c_before, DTYPE: tl.constexpr):
    """(i, f, g, o, c, h) of a step, in float32; r, the recurrent part of z, is added where ``m_r`` is set.

    Elsewhere z includes W_hh h_0 already, and r, zero times weights that may be infinite, may be NaN.
    """
    i = sigmoid(z_i.to(tl.float32) + tl.where(m_r, r_i, 0.0), DTYPE)
    f = sigmoid(z_f.to(tl.float32) + tl.where(m_r, r_f, 0.0), DTYPE)
    g = tanh(z_g.to(tl.float32) + tl.where(m_r, r_g, 0.0), DTYPE)
    o = sigmoid(z_o.to(tl.float32) + tl.where(m_r, r_o, 0.0), DTYPE)
    c = cell_state(i, f, g, c_before)
    return i, f, g, o, c, hidden_state(o, tanh(c, DTYPE))


@triton.jit
def backward_step(dc, dh, i, f, g, o, c, c_before, DTYPE: tl.constexpr):
    """(dz_i, dz_f, dz_g, dz_o, dc, dc of the step before) in float32, from the gradients that arrive at c and h."""
    tanh_c = tanh(c, DTYPE)
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    dc = cell_grad(dc, dh, o, tanh_c)
    dz_i, dz_f, dz_g, dz_o = gate_grads(dc, dh, i, f, g, o, c_before, tanh_c)
    return dz_i, dz_f, dz_g, dz_o, dc, cell_grad_prev(dc, f)


@triton.jit
def square_sum(x, mask):
    """(BT,): the sum of squares of each row; in float64: those of a vanishing gradient would underflow in float32."""
    wide = tl.where(mask, x, 0.0).to(tl.float64)
    return tl.sum(wide * wide, 1)


@triton.jit
def store_norms(norms, slice, slices, t, row, dh, dc, m, m_row, T, B):
    """Writes sums over a slice's units of the squared gradients at h and c of step t to (2, slices, T, B).

    ``slice``: of all directions, of which there are ``slices``; ``row`` and ``m_row`` (BT,).
    """
    p = norms + (slice * T + t) * B + row
    tl.store(p, square_sum(dh, m), mask=m_row)
    tl.store(p + slices * T.to(tl.int64) * B, square_sum(dc, m), mask=m_row)


@triton.jit
def position(t, row, offsets, step, stride, RAGGED: tl.constexpr):
    """The position of (t, row), in tokens, 64 bits."""
    if RAGGED:
        return tl.load(offsets + t) + row
    else:
        return t * step + row.to(tl.int64) * stride


@triton.jit
def active(t, row, offsets, B, exists, RAGGED: tl.constexpr):
    """Whether ``row`` has a step t, which must be one of 0 ... T - 1; false if ``exists`` is false."""
    rows = B
    if RAGGED:
        rows = tl.load(offsets + t + 1) - tl.load(offsets + t)
    return row < tl.where(exists, rows, 0)


@triton.jit
def extent(t, offsets, B, exists, step, RAGGED: tl.constexpr):
    """The first token of step t and its number of rows, which is 0 if ``exists`` is false.  Scalars.

    For what a loop carries from one step to the next: masks and positions computed from these are free in any layout,
    while carried tensors have one layout and go through shared memory for each other one, with two barriers.
    """
    if RAGGED:
        begin = tl.load(offsets + t)
        return begin, tl.where(exists, tl.load(offsets + t + 1) - begin, 0).to(tl.int32)
    else:
        return t * step, tl.where(exists, B, 0)


@triton.jit
def to_bits(x, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """``x`` in DTYPE as integers, never -1: that one NaN means "not written yet" (see ``receive``)."""
    bits = x.to(DTYPE).to(BITS, bitcast=True)
    quiet = (1 << (BITS.primitive_bitwidth - 1)) - 1  # also a NaN
    return tl.where(bits == -1, quiet, bits)


@triton.jit
def missing_in(words, PACK: tl.constexpr):
    """Above 0 if any entry of ``words`` (32 bits, PACK entries in each) is -1.

    Two halves are tested in three instructions: ``(v - 1) & ~v & top bit``, with v the complement, is the well-known
    test for a zero in each half of a word.  (Entry by entry it took 374 instructions for the eight loads of a thread,
    and the waiting loop was the longest part of a step.)
    """
    if PACK == 1:
        return tl.max((words == -1).to(tl.int32), axis=None)
    else:
        found = (~words - 0x00010001) & words & -0x7FFF8000
        return (tl.max(found.to(tl.uint32, bitcast=True), axis=None) > 0).to(tl.int32)


@triton.jit
def start_votes(x):
    """``x``, a scalar.  A kernel calls this once, before anything else: it declares the register that ``vote`` uses."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            ".reg .b32 lstm_missing; mov.b32 lstm_missing, 0; mov.b32 $0, $1;",
            "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def vote(words, PACK: tl.constexpr):
    """Above 0, for all threads of the program, if any thread has an entry of ``words`` that is -1.

    Each thread applies the test of ``missing_in``, and a voting barrier combines the results.  A reduction does the
    same with five shuffles, two trips through shared memory and three barriers: with it a step of the split design
    took 5 to 15 % longer (H200, bfloat16, B 16: backward 1.91 for 1.62 microseconds at H 256, 4.14 for 3.76 at
    H 1024).
    """
    if INTERPRETED:
        return missing_in(words, PACK)
    else:
        if PACK == 1:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 f; setp.eq.b32 p, $1, 0xffffffff; selp.b32 f, 0x80000000, 0, p; "
                "or.b32 lstm_missing, lstm_missing, f; mov.b32 $0, 0; }",
                "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            # The same test in two instructions: ~w - 0x00010001 is 0xfffefffe - w, and one more, a | b & c, notes what
            # it finds among bits that do not count.
            tl.inline_asm_elementwise(
                "{ .reg .b32 f; sub.u32 f, 0xfffefffe, $1; lop3.b32 lstm_missing, lstm_missing, f, $1, 0xf8; "
                "mov.b32 $0, 0; }",
                "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "{ .reg .pred p, q; .reg .b32 f; and.b32 f, lstm_missing, 0x80008000; setp.ne.b32 p, f, $1; "
            "barrier.cta.red.or.pred q, 0, p; selp.b32 $0, 1, 0, q; mov.b32 lstm_missing, $1; }",
            "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def receive(words, p, mask, patience, PACK: tl.constexpr):
    """Waits until all of ``words``, loaded from ``p``, have been written: no entry is -1.

    The data of other programs are their own flags: the tensor is filled with -1 before the launch, each entry is
    written once, and a reader loads (past its first-level cache: volatile) until it sees no -1.  No other memory is
    involved whose order could matter.  Returns the words and whether ``patience`` tries were not enough; missing
    entries are then NaN.
    """
    missing = vote(words, PACK)
    tries = patience
    while (missing > 0) & (tries > 0):
        words = tl.load(p, mask=mask, other=0, volatile=True)
        missing = vote(words, PACK)
        tries -= 1
    return words, missing


@triton.jit
def product_of_words(w, words, keep, acc, PACK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w times the values in ``words`` (KW, KS / PACK, BT), with zeros in rows where ``keep`` is false.

    With two values per word the even and the odd terms are multiplied one after the other, each by its own half of the
    weights: nothing has to be interleaved.  ``w`` is a tuple of PACK tensors.
    """
    words = tl.where(keep[None, None, :], words, 0)
    if PACK == 1:
        return product(w[0], words.to(DTYPE, bitcast=True), acc, PRECISION)
    else:
        acc = product(w[0], words.to(tl.int16).to(DTYPE, bitcast=True), acc, PRECISION)
        return product(w[1], (words >> 16).to(tl.int16).to(DTYPE, bitcast=True), acc, PRECISION)


@triton.jit
def prefetch_gates(gates, t, row, first, sizes, offsets, H: tl.constexpr, RAGGED: tl.constexpr):
    """Asks for the lines of (N, 4H) gates that begin at unit ``first`` of step t to come to the second-level cache.

    From memory they take as long as a hand-off; asked for a few steps ahead, they are there.  t may be out of range.
    """
    T, B, _, step, stride = sizes
    if not INTERPRETED:
        exists = (t >= 0) & (t < T)
        t = tl.minimum(tl.maximum(t, 0), T - 1)
        there = active(t, row, offsets, B, exists, RAGGED)
        gate = tl.arange(0, 4)[None, :]
        p = gates + position(t, row, offsets, step, stride, RAGGED)[:, None] * (4 * H) + gate * H + first
        tl.inline_asm_elementwise(
            "{ .reg .pred q; setp.ne.b32 q, $2, 0; @q prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [p.to(tl.int64), (there[:, None] & (gate < 4)).to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def jitter(seed, i, patience, NANOSECONDS: tl.constexpr):
    """Sleeps for a pseudo-random time, which also depends on ``patience``; for tests that look for races."""
    hashed = (seed * 7919 + i * 104729 + patience * 31 + 12345) & 0x7FFFFFFF
    hashed = (hashed ^ (hashed >> 7)) * 48271 & 0x7FFFFFFF
    return tl.inline_asm_elementwise(
        "nanosleep.u32 $1; mov.u32 $0, $1;", "=r,r", [hashed % NANOSECONDS], dtype=tl.int32, is_pure=False, pack=1
    )
