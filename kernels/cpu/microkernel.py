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

On AMX the sums of up to 16 rows are in tiles; they are read back from memory and finished a row at a time.  There A is
read 16 terms at a time, and strips are ``[group of terms][row][term]``.

W is packed by ``jobs.py`` so that one k is ``vectors * lanes`` adjacent values.  A is read in one of two ways:

* ``by_rows``: A[r, k] at ``a + offset[r] + k * size``; k may be split into panels that are ``stride`` bytes apart.
* ``by_strip``: A[r, k] at ``a + (k * rows + r) * size``; the transposed product of the weight gradients, whose k is
  the index of a token.  Its operand is first copied into strips as wide as the block: read in place, the entries of a
  column are a page apart and fall into one set of the first-level cache (see ``docs/notes/cpu-tuning.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.compiler import Flags
from numba.core.extending import intrinsic
from numba.core.typing import signature

from . import tiles
from .variant import Variant
from .vector import I64, PTR, dot_pairs, fma, pair_values, prefetch, splat

SEGMENT = 7  # values of a segment
# Bytes ahead of the product at which W is prefetched into the first-level cache.  Without it 6 rows reach 0.7 of the
# peak, not 1, when W comes from the second-level cache.
NEAR = 1024


class Around(NamedTuple):
    """What a block does before and after its products; all are Numba functions, inlined.

    ``begin(extra) -> (address, bytes per row)``: where the sums of each row start from, adjacent vectors; None: zeros.
    ``finish(row, accumulators, extra)``.  ``finish_rows(rows, extra)``: called after that, once.
    ``rolled``: finish is a loop over rows, which reads the sums back from the stack; for a long ``finish``, whose
    constants and temporaries would otherwise spill the sums of the other rows one at a time.
    """

    finish: Callable
    begin: Callable | None = None
    finish_rows: Callable | None = None
    rolled: bool = False


def make_block(
    variant: Variant,
    vectors: int,
    around: Around,
    *,
    name: str = "",
    rows: Sequence[int] | None = None,
    by_strip: bool = False,
    near: int = NEAR,
):
    """An intrinsic ``block(count, segments, extra)``: ``count`` rows of ``vectors`` vectors.

    ``segments``: a tuple of int64 of seven times the number of sums to add up: ``a, offsets, panels, stride, depth,
    w, ahead`` (``by_strip``: ``offsets`` and ``stride`` are not used; ``panels`` is 1); ``depth``: in terms.  ``ahead``
    is memory that will be needed soon: one cache line of it per term is prefetched into the second-level cache.
    ``extra``: a NamedTuple of int64 for the functions of ``around``.  ``name``: of everything that these close over
    beyond the variant: blocks of the same function and name are taken to be the same code.  ``rows``: the counts to
    compile for, if not all that the variant has.  ``near``: see ``NEAR``.  Tiles use neither these nor ``ahead``.
    """
    tiled = variant.products.tiled
    block_of = (_TileBlock if tiled else _Block)(variant, vectors, around, by_strip, near)
    counts = [0] if tiled else list(rows or variant.block.row_choices(vectors))  # tiles: of any number of rows
    symbol = f"lstmcore_{around.finish.__name__}_{variant.key}_{name}_{vectors}"

    @intrinsic
    def block(typingctx, count, segments, extra):
        def codegen(context, builder, sig, args):
            count, segments, extra = args
            sums = sig.args[1].count // SEGMENT
            values = [count] + [builder.extract_value(segments, i) for i in range(SEGMENT * sums)]
            values += [builder.extract_value(extra, i) for i in range(sig.args[2].count)]
            functions = [block_of.emit(context, builder.module, f"{symbol}_{n}", n, sums, sig.args[2]) for n in counts]
            if tiled:
                builder.call(functions[0], values)
                return context.get_dummy_value()
            end = builder.append_basic_block("block_end")
            switch = builder.switch(count, end)
            for n, function in zip(counts, functions, strict=True):
                case = builder.append_basic_block(f"rows_{n}")
                switch.add_case(I64(n), case)
                with builder.goto_block(case):
                    builder.call(function, values)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(types.int64, segments, extra), codegen

    return block


class _Emitter(NamedTuple):
    """The parameters of :func:`make_block`."""

    variant: Variant
    vectors: int
    around: Around
    by_strip: bool
    near: int


class Emitted(_Emitter):
    """What the code of all kinds of blocks has in common."""

    def emit(self, context, module, symbol, n, sums, extra_type):
        """The function for ``n`` rows, of ``sums`` segments and the values of an ``extra_type``."""
        function = self.declare(module, symbol, 1 + SEGMENT * sums + extra_type.count)
        if function.blocks:
            return function
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        count, *values = function.args
        segments = [values[SEGMENT * i : SEGMENT * (i + 1)] for i in range(sums)]
        extra = self.pack(context, builder, extra_type, values[SEGMENT * sums :])
        count = I64(n) if n else count
        self.multiply(context, builder, count, segments, extra, extra_type)
        if self.around.finish_rows is not None:
            sig = signature(types.void, types.int64, extra_type)
            call_inline(context, builder, self.around.finish_rows, sig, [count, extra])
        builder.ret_void()
        return function

    def multiply(self, context, builder, count, segments, extra, extra_type):
        """Multiplies ``count`` rows, and finishes each."""
        raise NotImplementedError

    @staticmethod
    def declare(module, symbol, arity):
        """The function of ``arity`` int64, with or without its blocks."""
        function = module.globals.get(symbol)
        if function is None:
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arity), symbol)
            function.linkage = "linkonce_odr"  # one copy, even if several libraries of device functions contain it
            function.attributes.add("noinline")
        return function

    @staticmethod
    def pack(context, builder, extra_type, values):
        """The value of ``extra_type`` that has these fields."""
        extra = ir.Constant(context.get_value_type(extra_type), ir.Undefined)
        for i, value in enumerate(values):
            extra = builder.insert_value(extra, value, i)
        return extra

    @property
    def llvm(self) -> ir.Type:
        """LLVM's type of a vector of sums."""
        return self.variant.ops.vector.llvm

    def begin(self, context, builder, extra, extra_type):
        """(address, bytes per row) of the initial sums, or None."""
        if self.around.begin is None:
            return None
        pair = call_inline(
            context, builder, self.around.begin, signature(types.UniTuple(types.int64, 2), extra_type), [extra]
        )
        return builder.extract_value(pair, 0), builder.extract_value(pair, 1)

    def start_row(self, builder, begin, row):
        """The initial sums of a row."""
        if begin is None:
            return [ir.Constant(self.llvm, None)] * self.vectors
        address, stride = begin
        at = builder.add(address, builder.mul(row, stride))
        bytes_wide = self.variant.vector_bytes
        pointers = [builder.inttoptr(builder.add(at, I64(v * bytes_wide)), PTR) for v in range(self.vectors)]
        return [builder.load(pointer, typ=self.llvm, align=self.variant.size) for pointer in pointers]

    def finish_row(self, context, builder, row, values, extra, extra_type):
        several = types.UniTuple(self.variant.ops.vector, self.vectors)
        sig = signature(types.void, types.int64, several, extra_type)
        result = context.make_tuple(builder, several, values)
        call_inline(context, builder, self.around.finish, sig, [row, result, extra])

    def finish_stored(self, context, builder, count, memory, order, extra, extra_type):
        """Finishes ``count`` rows whose sums are in memory; ``order``: vectors from a row and a vector to the next."""
        with Loop(builder, count, 1, "row") as r:
            self.finish_stored_row(context, builder, r, memory, order, extra, extra_type)

    def finish_stored_row(self, context, builder, r, memory, order, extra, extra_type):
        first = builder.mul(r, I64(order[0]))
        places = [builder.add(first, I64(v * order[1])) for v in range(self.vectors)]
        at = [builder.gep(memory, [place], source_etype=self.llvm) for place in places]
        values = [builder.load(address, typ=self.llvm) for address in at]
        self.finish_row(context, builder, r, values, extra, extra_type)

    @staticmethod
    def rows_apart(builder, offsets, several):
        """(the offset of row 0, bytes from a row of a tile to the next), from ``offsets`` of one row or ``several``."""
        first, second = (
            builder.load(builder.inttoptr(builder.add(offsets, of_row), PTR), typ=I64, align=8)
            for of_row in (I64(0), builder.select(several, I64(8), I64(0)))
        )
        return first, builder.select(several, builder.sub(second, first), I64(64))

    def each_group(self, builder, segment, count, multiply):
        """Calls ``multiply(builder, a, bytes per row of a, w, vectors)`` for each group of terms of a product."""
        a, offsets, panels, stride, depth, w, _ = segment
        width, apart, group = self.vectors * 64, I64(64), tiles.TERMS
        group_apart = 4 * group * (tiles.ROWS if self.by_strip else 1)
        if not self.by_strip:
            first, apart = self.rows_apart(builder, offsets, builder.icmp_signed(">", count, I64(1)))
            a = builder.add(a, first)
        with Loop(builder, panels, 1, "panel") as panel:
            a_panel = builder.add(a, builder.mul(panel, stride))
            w_panel = builder.add(w, builder.mul(builder.mul(panel, depth), I64(width)))
            with Loop(builder, depth, group, "group") as k:
                here = builder.add(a_panel, builder.mul(builder.sdiv(k, I64(group)), I64(group_apart)))
                multiply(builder, here, apart, builder.add(w_panel, builder.mul(k, I64(width))), self.vectors)

    def emulate(self, builder, segments, count, begin, memory):
        """Writes the sums of ``count`` rows as tiles would: those of first and of second values of a group, and both,
        are added to what there is."""
        sums = [builder.alloca(self.llvm) for _ in range(self.vectors)]
        with Loop(builder, count, 1, "emulated") as r:
            for place, value in zip(sums, self.start_row(builder, begin, r), strict=True):
                builder.store(value, place)
            for segment in segments:
                self.each_group(builder, segment, count, _emulated_group(self.llvm, sums, r))
            for v, place in enumerate(sums):
                at = builder.gep(memory, [builder.add(r, I64(v * tiles.ROWS))], source_etype=self.llvm)
                builder.store(builder.load(place, typ=self.llvm), at)


def _emulated_group(llvm, sums, r):
    """For ``each_group``: row r of a group, by vectors of float32."""

    def multiply(builder, a, apart, w, vectors):
        row, zero = builder.add(a, builder.mul(r, apart)), ir.Constant(llvm, None)
        halves = [[zero, zero] for _ in range(vectors)]
        for k in range(tiles.TERMS):
            at = builder.inttoptr(builder.add(row, I64(4 * k)), PTR)
            of_row = pair_values(builder, splat(builder, builder.load(at, typ=llvm.element, align=4), llvm.count))
            for v, half in enumerate(halves):
                place = builder.add(w, I64((k * vectors + v) * 64))
                of_w = builder.load(builder.inttoptr(place, PTR), typ=llvm, align=4)
                half[:] = [fma(builder, *both) for both in zip(of_row, pair_values(builder, of_w), half, strict=True)]
        for place, half in zip(sums, halves, strict=True):
            builder.store(builder.fadd(builder.load(place, typ=llvm), builder.fadd(*half)), place)

    return multiply


class _Block(Emitted):
    """Sums in vector registers: the number of rows is known when it is compiled."""

    def multiply(self, context, builder, count, segments, extra, extra_type):
        n, begin = count.constant, self.begin(context, builder, extra, extra_type)
        # Variables on the stack, which LLVM keeps in registers.
        accumulators = [[builder.alloca(self.llvm) for _ in range(self.vectors)] for _ in range(n)]
        for r, row in enumerate(accumulators):
            for accumulator, value in zip(row, self.start_row(builder, begin, I64(r)), strict=True):
                builder.store(value, accumulator)
        step = (_by_strip if self.by_strip else _by_rows)(builder, self.variant, n, self.vectors, self.near)
        for part in vectors_together(n, self.vectors, self.variant.block.registers):
            for segment in segments:
                step(*segment, accumulators, part)
        sums = [[builder.load(each, typ=self.llvm) for each in row] for row in accumulators]
        if not self.around.rolled:
            for r, values in enumerate(sums):
                self.finish_row(context, builder, I64(r), values, extra, extra_type)
            return
        memory = builder.alloca(self.llvm, size=n * self.vectors)
        for i, value in enumerate(value for row in sums for value in row):
            builder.store(value, builder.gep(memory, [I64(i)], source_etype=self.llvm))
        self.finish_stored(context, builder, count, memory, (self.vectors, 1), extra, extra_type)


class _TileBlock(Emitted):
    """Sums in AMX's tiles, or as if they were: up to 16 rows, of which a tile may read more than there are.

    The rows of ``by_rows`` are equally far apart.  ``tiles.tile_state`` says how many rows a tile has; the results of
    those beyond ``count`` are ignored, and what they are computed from has to be readable.
    """

    def multiply(self, context, builder, count, segments, extra, extra_type):
        begin = self.begin(context, builder, extra, extra_type)
        memory = builder.alloca(self.llvm, size=self.vectors * tiles.ROWS)
        memory.align = 64
        if self.variant.products.emulated:
            self.emulate(builder, segments, count, begin, memory)
        else:
            tiles.start(builder, begin, self.vectors)
            for segment in segments:
                self.each_group(builder, segment, count, tiles.multiply)
            tiles.store(builder, memory, self.llvm, self.vectors)
        self.finish_stored(context, builder, count, memory, (1, tiles.ROWS), extra, extra_type)


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


class Loop:
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


def vectors_together(rows, vectors, registers):
    """Groups of vectors that are multiplied together: all, if their sums, W and a broadcast of A fit the registers."""
    together = vectors
    while together > 1 and rows * together + together + 1 > registers:
        together //= 2
    return [range(first, first + together) for first in range(0, vectors, together)]


def _multiply(builder, variant, near, a_addresses, w_address, accumulators, part):
    """One term: acc[r, v] += A[r] W[v] for v in ``part``."""
    vector, size, bytes_wide, products = variant.ops.vector.llvm, variant.size, variant.vector_bytes, variant.products
    w = [
        builder.load(builder.inttoptr(builder.add(w_address, I64(v * bytes_wide)), PTR), typ=vector, align=size)
        for v in part
    ]
    for line in range(part[0] * bytes_wide, (part[-1] + 1) * bytes_wide, 64):
        prefetch(builder, builder.add(w_address, I64(near + line)), near=True)
    for r, a_address in enumerate(a_addresses):
        value = builder.load(builder.inttoptr(a_address, PTR), typ=vector.element, align=variant.operand_size)
        a = splat(builder, value, vector.count)
        for v, of_vector in zip(part, w, strict=True):
            accumulator = accumulators[r][v]
            before = builder.load(accumulator, typ=vector)
            if products.paired:
                after = dot_pairs(builder, a, of_vector, before, products.emulated)
            else:
                after = fma(builder, a, of_vector, before)
            builder.store(after, accumulator)


def _by_rows(builder, variant, n, vectors, near):
    size = variant.size

    def step(a, offsets, panels, stride, depth, w, ahead, accumulators, part):
        width = vectors * variant.block.lanes  # of W, in terms
        rows = [
            builder.add(a, builder.load(builder.inttoptr(builder.add(offsets, I64(8 * r)), PTR), typ=I64, align=8))
            for r in range(n)
        ]
        bytes_deep = builder.mul(depth, I64(size))
        with Loop(builder, panels, 1, "panel") as panel:
            jump = builder.mul(panel, stride)
            here = [builder.add(row, jump) for row in rows]
            w_panel = builder.add(w, builder.mul(panel, builder.mul(bytes_deep, I64(width))))
            ahead_panel = builder.add(ahead, builder.mul(panel, builder.mul(depth, I64(64))))
            with Loop(builder, bytes_deep, size, "k") as k:
                if part[0] == 0:
                    prefetch(builder, builder.add(ahead_panel, builder.mul(k, I64(64 // size))), near=False)
                addresses = [builder.add(row, k) for row in here]
                w_k = builder.add(w_panel, builder.mul(k, I64(width)))
                _multiply(builder, variant, near, addresses, w_k, accumulators, part)

    return step


def _by_strip(builder, variant, n, vectors, near):
    size = variant.size

    def step(a, offsets, panels, stride, depth, w, ahead, accumulators, part):
        width = vectors * variant.vector_bytes
        with Loop(builder, depth, 1, "k") as k:
            if part[0] == 0:
                prefetch(builder, builder.add(ahead, builder.mul(k, I64(64))), near=False)
            row = builder.add(a, builder.mul(k, I64(n * size)))
            addresses = [builder.add(row, I64(r * size)) for r in range(n)]
            _multiply(builder, variant, near, addresses, builder.add(w, builder.mul(k, I64(width))), accumulators, part)

    return step
