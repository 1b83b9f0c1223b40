"""Register-blocked matrix products on LLVM vectors: all matrix multiplications run here.

A block holds ``rows x vectors`` accumulators in registers while it iterates over k::

    acc[r, v] = start(r)[v] + sum_k A[r, k] W[k, v]          then  finish(r, acc[r, :])

Each k costs ``vectors`` loads of W, ``rows`` broadcasts of A and ``rows * vectors`` fused multiply-adds, which is
what keeps the multipliers busy: with 24 accumulators on 32 registers, 12 cycles of arithmetic against 10 loads.  On 16
registers the vectors are processed in two halves, 12 accumulators each: 6 cycles against 8 loads, two per cycle, and A
is read twice.  (On an AMD EPYC with AVX2, in GF/s per core: 6 rows in halves 95, 3 rows x 4 vectors 41 to 58, 2 x 4 90;
MKL's product of two matrices of 1024 x 1024 there 88.)  ``start`` and ``finish`` are Numba functions (load a bias or
earlier sums; the LSTM cell, a store); they are inlined around the loop, so the cell mostly finds its sums in registers.

The code is emitted as LLVM IR by a Numba intrinsic, once per number of rows: register blocking left to an optimiser
spills.  The number of rows is chosen at run time among those compiled; it does not change the order of the sum over k,
so the result of a row does not depend on its block.

W is packed by ``jobs.py`` so that one k is ``vectors * lanes`` adjacent values.  A is read in one of two ways:

* ``by_rows``: A[r, k] at ``a + offset[r] + k * size``; k may be split into panels that are ``stride`` bytes apart.
* ``by_strip``: A[r, k] at ``a + (k * rows + r) * size``; the transposed product of the weight gradients, whose k is
  the index of a token.  Its operand is first copied into strips as wide as the block: read in place, the entries of a
  column are a page apart and fall into one set of the first-level cache (see ``docs/notes/cpu-tuning.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.compiler import Flags
from numba.core.extending import intrinsic
from numba.core.typing import signature

from .vector import I32, I64, PTR, fma, llvm_call, splat

SEGMENT = 7  # values of a segment
# Bytes ahead of the product at which W is prefetched into the first-level cache.  Without it 6 rows reach 0.7 of the
# peak, not 1, when W comes from the second-level cache.
NEAR = 1024


def make_block(
    simd,
    rows: Sequence[int],
    vectors: int,
    start: Callable,
    finish: Callable,
    *,
    key: str,
    registers: int,
    by_strip: bool = False,
    rolled: bool = False,
    finish_rows: Callable | None = None,
    near: int = NEAR,
):
    """An intrinsic ``block(count, segments, extra)``: ``count`` (one of ``rows``) rows of ``vectors`` vectors.

    ``segments``: a tuple of int64 of seven times the number of sums to add up: ``a, offsets, panels, stride, depth,
    w, ahead`` (``by_strip``: ``offsets`` and ``stride`` are not used; ``panels`` is 1).  ``ahead`` is memory that will
    be needed soon: one cache line of it per k is prefetched into the second-level cache.  ``registers``: of the
    processor, for vectors.  ``key`` names everything that ``start`` and ``finish`` close over: blocks of the same
    function name and key are taken to be the same code.  ``extra``: a NamedTuple of int64 for ``start(row, extra) ->
    tuple of vectors`` and ``finish(row, accumulators, extra)``.
    ``rolled``: finish is a loop over rows, which reads the sums back from the stack; for a long ``finish``, whose
    constants and temporaries would otherwise spill the sums of the other rows one at a time.
    ``finish_rows(rows, extra)``: called after that, once.  ``near``: see ``NEAR``.
    """
    block_of = _Block(simd, vectors, start, finish, finish_rows, registers, by_strip, rolled, near)
    name = f"lstmcore_{finish.__name__}_{key}_{vectors}"

    @intrinsic
    def block(typingctx, count, segments, extra):
        def codegen(context, builder, sig, args):
            count, segments, extra = args
            sums = sig.args[1].count // SEGMENT
            values = [builder.extract_value(segments, i) for i in range(SEGMENT * sums)]
            values += [builder.extract_value(extra, i) for i in range(sig.args[2].count)]
            end = builder.append_basic_block("block_end")
            switch = builder.switch(count, end)
            for n in rows:
                function = block_of.emit(context, builder.module, f"{name}_{n}", n, sums, sig.args[2])
                case = builder.append_basic_block(f"rows_{n}")
                switch.add_case(I64(n), case)
                with builder.goto_block(case):
                    builder.call(function, values)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(types.int64, segments, extra), codegen

    return block


class _Block(NamedTuple):
    """The parameters of :func:`make_block`, and the code generation."""

    simd: Any
    vectors: int
    start: Callable
    finish: Callable
    finish_rows: Callable | None
    registers: int
    by_strip: bool
    rolled: bool
    near: int

    def emit(self, context, module, symbol, n, sums, extra_type):
        """The function for ``n`` rows, of ``sums`` segments and the values of an ``extra_type``."""
        known = module.globals.get(symbol)
        if known is not None:
            return known
        arity = SEGMENT * sums + extra_type.count
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arity), symbol)
        function.linkage = "linkonce_odr"  # one copy, even if several libraries of device functions contain it
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        segments, extra_values = function.args[: SEGMENT * sums], function.args[SEGMENT * sums :]
        extra = ir.Constant(context.get_value_type(extra_type), ir.Undefined)
        for i, value in enumerate(extra_values):
            extra = builder.insert_value(extra, value, i)

        accumulators = self._started(context, builder, n, extra, extra_type)
        step = (_by_strip if self.by_strip else _by_rows)(builder, self.simd, n, self.vectors, self.near)
        for part in vectors_together(n, self.vectors, self.registers):
            for i in range(sums):
                step(*segments[SEGMENT * i : SEGMENT * (i + 1)], accumulators, part)
        (self._finished_in_a_loop if self.rolled else self._finished)(context, builder, accumulators, extra, extra_type)
        if self.finish_rows is not None:
            sig = signature(types.void, types.int64, extra_type)
            call_inline(context, builder, self.finish_rows, sig, [I64(n), extra])
        builder.ret_void()
        return function

    @property
    def _tuple(self) -> types.Type:
        return types.UniTuple(self.simd.vector, self.vectors)

    def _started(self, context, builder, n, extra, extra_type):
        """The initial sums of each row: variables on the stack, which LLVM keeps in registers."""
        llvm = self.simd.vector.llvm
        accumulators = [[builder.alloca(llvm) for _ in range(self.vectors)] for _ in range(n)]
        sig = signature(self._tuple, types.int64, extra_type)
        for r, row in enumerate(accumulators):
            first = call_inline(context, builder, self.start, sig, [I64(r), extra])
            for v, accumulator in enumerate(row):
                builder.store(builder.extract_value(first, v), accumulator)
        return accumulators

    def _finish_row(self, context, builder, row, values, extra, extra_type):
        result = context.make_tuple(builder, self._tuple, values)
        sig = signature(types.void, types.int64, self._tuple, extra_type)
        call_inline(context, builder, self.finish, sig, [row, result, extra])

    def _finished(self, context, builder, accumulators, extra, extra_type):
        for r, row in enumerate(accumulators):
            values = [builder.load(each, typ=self.simd.vector.llvm) for each in row]
            self._finish_row(context, builder, I64(r), values, extra, extra_type)

    def _finished_in_a_loop(self, context, builder, accumulators, extra, extra_type):
        llvm, vectors = self.simd.vector.llvm, self.vectors
        sums = [builder.load(each, typ=llvm) for row in accumulators for each in row]
        memory = builder.alloca(llvm, size=len(sums))
        for i, value in enumerate(sums):
            builder.store(value, builder.gep(memory, [I64(i)], source_etype=llvm))
        with _Loop(builder, I64(len(accumulators)), 1, "row") as r:
            first = builder.mul(r, I64(vectors))
            at = [builder.gep(memory, [builder.add(first, I64(v))], source_etype=llvm) for v in range(vectors)]
            values = [builder.load(address, typ=llvm) for address in at]
            self._finish_row(context, builder, r, values, extra, extra_type)


def call_inline(context, builder, function, sig, args):
    """Calls a Python function, compiled by Numba and inlined here."""
    flags = Flags()
    flags.no_compile = True
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.forceinline = True
    flags.error_model = "numpy"
    compiled = context.compile_subroutine(builder, function, sig, flags=flags)
    _, result = context.call_internal_no_propagate(builder, compiled.fndesc, sig, args)
    return result


class _Loop:
    """``for i in range(0, stop, step)`` in LLVM IR, as a context; ``index`` is i."""

    def __init__(self, builder, stop, step, name):
        self.builder, self.stop, self.step, self.name = builder, stop, step, name

    def __enter__(self):
        builder = self.builder
        before = builder.block
        self.body = builder.append_basic_block(self.name)
        self.end = builder.append_basic_block(self.name + "_end")
        builder.cbranch(builder.icmp_signed(">", self.stop, I64(0)), self.body, self.end)
        builder.position_at_end(self.body)
        self.index = builder.phi(I64)
        self.index.add_incoming(I64(0), before)
        return self.index

    def __exit__(self, *error):
        builder = self.builder
        following = builder.add(self.index, I64(self.step))
        self.index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self.stop), self.body, self.end)
        builder.position_at_end(self.end)


def _fetch(builder, address, near):
    """Prefetches a cache line into the first-level cache (near) or the second."""
    arguments = [builder.inttoptr(address, PTR), I32(0), I32(3 if near else 2), I32(1)]
    llvm_call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def vectors_together(rows, vectors, registers):
    """Groups of vectors that are multiplied together: all, if their sums, W and a broadcast of A fit the registers."""
    together = vectors
    while together > 1 and rows * together + together + 1 > registers:
        together //= 2
    return [range(first, first + together) for first in range(0, vectors, together)]


def _multiply(builder, simd, near, a_addresses, w_address, accumulators, part):
    """One k: acc[r, v] += A[r] W[v] for v in ``part``."""
    vector = simd.vector.llvm
    bytes_wide = simd.lanes * simd.size
    w = [
        builder.load(builder.inttoptr(builder.add(w_address, I64(v * bytes_wide)), PTR), typ=vector, align=simd.size)
        for v in part
    ]
    for line in range(part[0] * bytes_wide, (part[-1] + 1) * bytes_wide, 64):
        _fetch(builder, builder.add(w_address, I64(near + line)), near=True)
    for r, a_address in enumerate(a_addresses):
        value = builder.load(builder.inttoptr(a_address, PTR), typ=vector.element, align=simd.size)
        a = splat(builder, value, simd.lanes)
        for v, of_vector in zip(part, w, strict=True):
            accumulator = accumulators[r][v]
            builder.store(fma(builder, a, of_vector, builder.load(accumulator, typ=vector)), accumulator)


def _by_rows(builder, simd, n, vectors, near):
    def step(a, offsets, panels, stride, depth, w, ahead, accumulators, part):
        width = vectors * simd.lanes  # of W, in values
        rows = [
            builder.add(a, builder.load(builder.inttoptr(builder.add(offsets, I64(8 * r)), PTR), typ=I64, align=8))
            for r in range(n)
        ]
        bytes_deep = builder.mul(depth, I64(simd.size))
        with _Loop(builder, panels, 1, "panel") as panel:
            jump = builder.mul(panel, stride)
            here = [builder.add(row, jump) for row in rows]
            w_panel = builder.add(w, builder.mul(panel, builder.mul(bytes_deep, I64(width))))
            ahead_panel = builder.add(ahead, builder.mul(panel, builder.mul(depth, I64(64))))
            with _Loop(builder, bytes_deep, simd.size, "k") as k:
                if part[0] == 0:
                    _fetch(builder, builder.add(ahead_panel, builder.mul(k, I64(64 // simd.size))), near=False)
                addresses = [builder.add(row, k) for row in here]
                w_k = builder.add(w_panel, builder.mul(k, I64(width)))
                _multiply(builder, simd, near, addresses, w_k, accumulators, part)

    return step


def _by_strip(builder, simd, n, vectors, near):
    def step(a, offsets, panels, stride, depth, w, ahead, accumulators, part):
        width = vectors * simd.lanes * simd.size
        with _Loop(builder, depth, 1, "k") as k:
            if part[0] == 0:
                _fetch(builder, builder.add(ahead, builder.mul(k, I64(64))), near=False)
            row = builder.add(a, builder.mul(k, I64(n * simd.size)))
            addresses = [builder.add(row, I64(r * simd.size)) for r in range(n)]
            _multiply(builder, simd, near, addresses, builder.add(w, builder.mul(k, I64(width))), accumulators, part)

    return step
