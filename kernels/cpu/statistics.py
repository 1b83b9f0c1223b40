"""What a recording gets from a backward pass: norms from sums of squares, and statistics of gates.

The statistics are those of the saved gates of a few rows, in one pass over memory that the backward pass has just read.
For the gates i, f and o: their sum and a histogram at every step, over the sampled rows and all units; and the sum of
ln f of every unit, which says how long the unit remembers.

Every lane of an accumulator counts its own histogram, in the ten fields of ``FIELD`` bits of a 64-bit word: a value
adds one, shifted to its bin.  The lanes are added up before a field can overflow, and at the end of a step.  (Nine
comparisons per gate, their results counted as bits, took at least twice as long.)  Logarithms are taken of products of
``FACTORS`` gates, so that they cost almost nothing.

T steps, R sampled rows, H hidden, U panels of ``lanes`` units, H' = U * lanes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from ..contract import Call, GateStatistics
from ..gate_statistics import BINS, LEAST, sampled_rows
from ..integers import ceil_div, starts_of
from . import buffers
from .jit import kernel
from .memory import load_int
from .simd import simd
from .steps import walk
from .variant import Variant
from .vector import I32, I64, PTR, llvm_call, splat, sum_lanes, widen_to_double

FACTORS = 40  # gates in a product: LEAST ** 40 is far from float64's smallest number
FIELD = 6  # bits of a bin
FULL = (1 << FIELD) - 1  # the largest count of a field


def _operations(scalar: str, lanes: int):
    """Vector operations of this kernel beyond ``simd``: (accumulate, empty, multiply_into)."""
    vector = simd(scalar, lanes).vector
    words = ir.VectorType(I64, lanes)

    def constant(value):
        return ir.Constant(ir.VectorType(I64, lanes), [value] * lanes)

    @intrinsic
    def accumulate(typingctx, total_at, fields_at, value, count):
        """Adds the first ``count`` lanes to the sums at ``total_at`` and to the histograms at ``fields_at``."""

        def codegen(context, builder, sig, args):
            totals, fields = (builder.inttoptr(address, PTR) for address in args[:2])
            value, count = args[2:]
            llvm = value.type
            iota = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
            some = builder.icmp_signed("<", iota, splat(builder, builder.trunc(count, I32), lanes))
            value = builder.select(some, value, ir.Constant(llvm, None))
            before = builder.load(totals, typ=llvm, align=8)
            builder.store(builder.fadd(before, value), totals, align=8)
            place = builder.fmul(value, splat(builder, ir.Constant(llvm.element, float(BINS)), lanes))
            last = splat(builder, ir.Constant(llvm.element, BINS - 0.5), lanes)
            place = builder.select(builder.fcmp_ordered("<", place, last), place, last)  # 1, and NaN: the last bin
            place = builder.fptosi(place, words if scalar == "float64" else ir.VectorType(I32, lanes))
            place = place if scalar == "float64" else builder.zext(place, words)
            one = builder.select(some, constant(1), constant(0))
            added = builder.shl(one, builder.mul(place, constant(FIELD)))
            counted = builder.load(fields, typ=words, align=8)
            builder.store(builder.add(counted, added), fields, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, vector, types.int64), codegen

    @intrinsic
    def empty(typingctx, total_at, fields_at, sum_at, counts_at):
        """Adds the accumulators up into a float64 at ``sum_at`` and BINS int32 at ``counts_at``, and zeroes them."""

        def codegen(context, builder, sig, args):
            totals, fields, result = (builder.inttoptr(address, PTR) for address in args[:3])
            llvm = vector.llvm
            total = sum_lanes(builder, widen_to_double(builder, builder.load(totals, typ=llvm, align=8)))
            before = builder.load(result, typ=ir.DoubleType(), align=8)
            builder.store(builder.fadd(before, total), result, align=8)
            builder.store(ir.Constant(llvm, None), totals, align=8)
            counted = builder.load(fields, typ=words, align=8)
            builder.store(constant(0), fields, align=8)
            # Every other field at a time, so that a sum over lanes has twice the bits per field: two sums, not ten.
            every_other = constant(sum(FULL << 2 * FIELD * b for b in range(BINS // 2)))
            for parity in range(2):
                some = builder.and_(builder.lshr(counted, constant(FIELD * parity)), every_other)
                number = llvm_call(builder, f"llvm.vector.reduce.add.v{lanes}i64", I64, [some])
                for b in range(parity, BINS, 2):
                    at = builder.inttoptr(builder.add(args[3], I64(4 * b)), PTR)
                    field = builder.and_(builder.lshr(number, I64(FIELD * (b - parity))), I64((1 << 2 * FIELD) - 1))
                    field = builder.add(builder.load(at, typ=I32, align=4), builder.trunc(field, I32))
                    builder.store(field, at, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    @intrinsic
    def multiply_into(typingctx, address, value):
        """Multiplies float64 lanes in memory by those of ``value``, which count as LEAST where they are less."""

        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], PTR)
            value = widen_to_double(builder, args[1])
            least = splat(builder, ir.Constant(ir.DoubleType(), LEAST), lanes)
            value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
            before = builder.load(pointer, typ=value.type, align=8)
            builder.store(builder.fmul(before, value), pointer, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, vector), codegen

    return accumulate, empty, multiply_into


@functools.cache
def statistics_kernel(variant: Variant) -> Any:
    """The compiled kernel, for gates (N, U, 4, lanes) of ``storage``."""
    lanes, stored, gate_bytes = variant.block.lanes, variant.stored, variant.block.lanes * 8
    load_storage = variant.ops.make_load(variant.storage)
    accumulate, empty, multiply_into = _operations(variant.scalar, lanes)

    @kernel(
        variant.key,
        numba.void(
            numba.float64[:, ::1], numba.int32[:, :, ::1], numba.float64[::1], numba.float64[:, ::1],
            numba.float64[:, :, ::1], *[numba.int64] * 10,
        ),
    )  # fmt: skip
    def lstm_gates_kernel(
        sums,  # (T, 3), zeros
        counts,  # (T, 3, BINS), zeros
        log_forget,  # (H,), zeros
        products,  # (R, H'), ones
        accumulators,  # (2, 3, lanes) of 8 bytes, zeros
        gates,
        rows,  # (R,) int64
        sampled,  # R
        row_starts,  # (T + 1,) int64; 0: t * batch
        steps,
        first,  # of the steps to count, in the direction's order
        last,
        reverse,
        batch,
        hidden,
    ):
        panels = -(-hidden // lanes)
        totals = accumulators.ctypes.data
        fields, scratch = totals + 3 * gate_bytes, products.ctypes.data
        # The order of backward, so that a product may continue where the call for the steps after it ended.
        for step in range(last - 1, first - 1, -1):
            t = walk(reverse, steps, step)
            first, end = t * batch, (t + 1) * batch
            if row_starts != 0:
                first, end = load_int(row_starts + 8 * t), load_int(row_starts + 8 * (t + 1))
            held = 0
            for s in range(sampled):
                n = first + load_int(rows + 8 * s)
                if n < end:
                    for p in range(panels):
                        at = gates + (n * panels + p) * 4 * lanes * stored
                        left = hidden - p * lanes
                        for k in range(3):  # i, f, o of i, f, g, o
                            value = load_storage(at + (k + k // 2) * lanes * stored, lanes)
                            accumulate(totals + k * gate_bytes, fields + k * gate_bytes, value, left)
                            if k == 1:
                                multiply_into(scratch + 8 * (s * panels + p) * lanes, value)
                        held += 1
                        if held == FULL:
                            for k in range(3):
                                empty(
                                    totals + k * gate_bytes, fields + k * gate_bytes,
                                    sums.ctypes.data + 8 * (3 * t + k), counts.ctypes.data + 4 * BINS * (3 * t + k),
                                )  # fmt: skip
                            held = 0
            for k in range(3):
                empty(
                    totals + k * gate_bytes, fields + k * gate_bytes,
                    sums.ctypes.data + 8 * (3 * t + k), counts.ctypes.data + 4 * BINS * (3 * t + k),
                )  # fmt: skip
            if step % FACTORS == 0:
                for s in range(sampled):
                    for u in range(hidden):
                        log_forget[u] += math.log(products[s, u])
                products[:] = 1.0

    return lstm_gates_kernel


@functools.cache
def norms_kernel(scalar: str):
    """The compiled kernel that makes norms of ``scalar`` from partial sums of squares."""

    @kernel(scalar, numba.void(getattr(numba, scalar)[:, ::1], numba.float64[:, :, ::1]))
    def lstm_norms_kernel(norms, squares):  # (2, T * B), (2, T * B, panel groups)
        groups = squares.shape[2]
        for which in range(2):
            if groups == 1:
                for n in range(norms.shape[1]):
                    norms[which, n] = math.sqrt(squares[which, n, 0])
            else:
                for n in range(norms.shape[1]):
                    total = 0.0
                    for group in range(groups):
                        total += squares[which, n, group]
                    norms[which, n] = math.sqrt(total)

    return lstm_norms_kernel


class Statistics:
    """The statistics of ``wanted`` rows of a call, from the gates of each direction, of all steps or some at a time.

    Steps come as backward takes them, the direction's last ones first.
    """

    def __init__(self, kernel: Callable, lanes: int, call: Call, wanted: int) -> None:
        rows, layer = call.rows, call.layer
        self._kernel, self._layer, self._sizes, starting = kernel, layer, rows.batch_sizes, rows.batch
        self._row_starts = None
        if rows.batch_sizes is not None:
            starting, self._row_starts = int(rows.batch_sizes[0]), starts_of(rows.batch_sizes.numpy())
        self._sample = sample = np.array(sampled_rows(starting, wanted))
        directions, steps, hidden = layer.directions, layer.steps, layer.hidden_size
        self._sums = np.zeros((directions, steps, 3))
        self._counts = np.zeros((directions, steps, 3, BINS), np.int32)
        self._log_forget = np.zeros((directions, hidden))
        size = 2 * 3 * lanes, directions * len(sample) * ceil_div(hidden, lanes) * lanes
        scratch = buffers.take(sum(size), torch.float64).numpy()  # aligned
        self._accumulators = scratch[: size[0]].reshape(2, 3, lanes)
        self._products = scratch[size[0] :].reshape(directions, len(sample), -1)
        self._accumulators[:], self._products[:] = 0, 1

    def add(self, direction: int, gates: int, first: int, last: int) -> None:
        """Steps ``first`` to ``last`` of a direction, whose gates (N, U, 4, lanes) lie at the address ``gates``."""
        starts = 0 if self._row_starts is None else self._row_starts.ctypes.data
        d, layer = direction, self._layer
        self._kernel(
            self._sums[d], self._counts[d], self._log_forget[d], self._products[d], self._accumulators,
            gates, self._sample.ctypes.data, len(self._sample), starts, layer.steps, first, last, d, layer.batch,
            layer.hidden_size,
        )  # fmt: skip

    def result(self) -> GateStatistics:
        sample, sizes = self._sample, self._sizes
        active = np.full(self._layer.steps, len(sample)) if sizes is None else (sample < sizes.numpy()[:, None]).sum(1)
        return GateStatistics(
            torch.from_numpy(self._sums).permute(2, 0, 1),
            torch.from_numpy(self._counts).permute(2, 0, 1, 3),
            torch.from_numpy(self._log_forget),
            torch.from_numpy(active),
        )
