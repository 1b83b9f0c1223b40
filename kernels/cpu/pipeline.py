"""The cell of one block of rows while AMX multiplies the next one.

Tiles and vectors are units of their own, but a processor looks only some 500 instructions ahead, and the cell of 16
rows has 1800: product and cell of a block take turns, unless their instructions do.  Here a call finishes the block
whose sums the call before it left in memory, a row at a time, and between the rows multiplies a share of the groups of
the next block.  Products of a step depend on nothing that its cells write, so only the first one waits.  (H = I = 128,
16 rows, one thread of a Xeon: 10.2 microseconds a step by turns, 8.8 so.)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from numba.core.typing import signature

from . import tiles
from .microkernel import SEGMENT, Around, Emitted, Loop, call_inline
from .variant import Variant
from .vector import I64, PTR

VECTORS = 4
FRACTION = 20  # bits of a share's fraction of a group
BUFFER = VECTORS * tiles.ROWS * 64  # bytes of the sums of a block


def make_pipelined_block(variant: Variant, around: Around) -> Any:
    """An intrinsic ``block(rows, extra, next_rows, next_segments, next_extra, buffer)``.

    Finishes ``rows`` rows whose sums lie in ``buffer``, and leaves those of ``next_rows`` rows there; either may be 0.
    ``next_segments``: two, as of ``microkernel.make_block`` and of one panel each.
    """
    emitter = _Pipelined(variant, VECTORS, around, False, 0)
    symbol = f"lstmcore_pipelined_{around.finish.__name__}_{variant.key}"

    @intrinsic
    def block(typingctx, rows, extra, next_rows, segments, next_extra, buffer):
        def codegen(context, builder, sig, args):
            rows, extra, next_rows, segments, next_extra, buffer = args
            fields = sig.args[1].count
            values = [rows, next_rows, buffer]
            values += [builder.extract_value(segments, i) for i in range(2 * SEGMENT)]
            values += [builder.extract_value(each, i) for each in (extra, next_extra) for i in range(fields)]
            builder.call(emitter.emit_pipelined(context, builder.module, symbol, sig.args[1]), values)
            return context.get_dummy_value()

        return types.void(types.int64, extra, types.int64, segments, extra, types.int64), codegen

    return block


class _Pipelined(Emitted):
    def emit_pipelined(self, context, module, symbol, extra_type):
        """The function for both blocks; ``extra_type``: of their values."""
        function = self.declare(module, symbol, 3 + 2 * SEGMENT + 2 * extra_type.count)
        if function.blocks:
            return function
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        rows, next_rows, buffer, *values = function.args
        segments = [values[SEGMENT * i : SEGMENT * (i + 1)] for i in range(2)]
        extras = values[2 * SEGMENT :]
        extra, next_extra = (
            self.pack(context, builder, extra_type, half)
            for half in (extras[: extra_type.count], extras[extra_type.count :])
        )
        memory = builder.inttoptr(buffer, PTR)
        product = (_Emulated if self.variant.products.emulated else _Shared)(self, builder, segments, next_rows)
        begin = self.begin(context, builder, next_extra, extra_type)
        some = builder.icmp_signed(">", next_rows, I64(0))
        with builder.if_then(some):
            product.start(begin)
        product.divide(rows)
        with Loop(builder, rows, 1, "row") as r:
            self.finish_stored_row(context, builder, r, memory, (1, tiles.ROWS), extra, extra_type)
            product.share(r)
        with builder.if_then(builder.icmp_signed(">", rows, I64(0))):
            sig = signature(types.void, types.int64, extra_type)
            call_inline(context, builder, self.around.finish_rows, sig, [rows, extra])
        product.rest(rows)
        with builder.if_then(some):
            product.store(memory)
        builder.ret_void()
        return function


class _Shared:
    """The product of the next block in shares: one after each row that is finished, the last at the end."""

    def __init__(self, emitter, builder, segments, count):
        self.emitter, self.builder = emitter, builder
        several = builder.icmp_signed(">", count, I64(1))
        self.sources, ends, total = [], [], I64(0)
        for a, offsets, _, _, depth, w, _ in segments:
            first, apart = emitter.rows_apart(builder, offsets, several)
            self.sources.append((builder.add(a, first), apart, w, total))
            groups = builder.sdiv(depth, I64(tiles.TERMS))
            total = builder.add(total, groups)
            ends.append(total)
        self.of_first = ends[0]
        none = builder.icmp_signed("==", count, I64(0))
        self.total = builder.select(none, I64(0), total)

    def start(self, begin):
        tiles.start(self.builder, begin, VECTORS)

    def divide(self, rows):
        """Divides the groups into equal shares for all rows, and for what follows them."""
        builder = self.builder
        whole = builder.shl(self.total, I64(FRACTION))
        self.of_a_share = builder.sdiv(whole, builder.add(rows, I64(1)))

    def share(self, r):
        """The groups of the share after row r."""
        self._groups(self._end(r), self._end(self.builder.add(r, I64(1))))

    def rest(self, rows):
        self._groups(self._end(rows), self.total)

    def _end(self, shares):
        """The groups of so many shares."""
        return self.builder.ashr(self.builder.mul(self.of_a_share, shares), I64(FRACTION))

    def _groups(self, first, last):
        builder = self.builder
        with Loop(builder, builder.sub(last, first), 1, "group") as i:
            g = builder.add(first, i)
            early = builder.icmp_signed("<", g, self.of_first)
            a, apart, w, before = (builder.select(early, *both) for both in zip(*self.sources, strict=True))
            k = builder.sub(g, before)
            a = builder.add(a, builder.mul(k, I64(4 * tiles.TERMS)))
            w = builder.add(w, builder.mul(k, I64(64 * VECTORS * tiles.TERMS)))
            tiles.multiply(builder, a, apart, w, VECTORS)

    def store(self, memory):
        tiles.store(self.builder, memory, self.emitter.llvm, VECTORS)


class _Emulated:
    """The same at the end, by vectors."""

    def __init__(self, emitter, builder, segments, count):
        self.emitter, self.builder, self.segments, self.count = emitter, builder, segments, count

    def start(self, begin):
        self.begin = begin

    def divide(self, rows):
        pass

    def share(self, r):
        pass

    def rest(self, rows):
        pass

    def store(self, memory):
        self.emitter.emulate(self.builder, self.segments, self.count, self.begin, memory)
