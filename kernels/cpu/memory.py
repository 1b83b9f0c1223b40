"""Loads and stores: of integers, of argument structs, and of vectors, whole and in part.

Addresses are int64 bytes, as ``Tensor.data_ptr()`` gives them; no alignment beyond the scalar's is assumed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .vector import I16, I32, I64, PTR, SIZE, Vector, llvm_call, narrow, splat, sum_lanes, widen, widen_to_double


@intrinsic
def load_int(typingctx, address):
    """The int64 at ``address``."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], PTR), typ=I64, align=8)

    return types.int64(types.int64), codegen


@intrinsic
def load_byte(typingctx, address):
    """The byte at ``address``, as int64."""

    def codegen(context, builder, sig, args):
        byte = builder.load(builder.inttoptr(args[0], PTR), typ=ir.IntType(8), align=1)
        return builder.zext(byte, I64)

    return types.int64(types.int64), codegen


@intrinsic
def fetch(typingctx, address):
    """Prefetches the cache line at ``address``, which need not be mapped."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], PTR)
        llvm_call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def store_int(typingctx, address, value):
    """Writes the int64 ``value`` to ``address``."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], PTR), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_double(typingctx, address, value):
    """Writes one float64 to ``address``."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], PTR), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float64), codegen


@functools.cache
def make_read(struct: type) -> Callable:
    """A function for kernels: the ``struct`` of int64 at an address."""
    fields = len(struct._fields)  # type: ignore[attr-defined]
    result = types.NamedUniTuple(types.int64, fields, struct)

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            base = builder.inttoptr(args[0], PTR)
            addresses = [builder.gep(base, [ir.Constant(I64, i)], source_etype=I64) for i in range(fields)]
            return context.make_tuple(builder, result, [builder.load(at, typ=I64, align=8) for at in addresses])

        return result(types.int64), codegen

    return read


def whole_vectors(vector: Vector) -> dict[str, Callable]:
    """``load(address)``, ``store(address, v)``, ``zeros()``, ``square_sum(v)``; ``make_zeros(number)``; ``load_four``.

    ``square_sum`` sums over lanes, always in float64: the squares of a vanishing gradient would underflow in float32.
    """
    lanes, size, llvm = vector.lanes, SIZE[vector.scalar], vector.llvm

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.load(builder.inttoptr(args[0], PTR), typ=llvm, align=size)

        return vector(types.int64), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            builder.store(args[1], builder.inttoptr(args[0], PTR), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, vector), codegen

    @intrinsic
    def zeros(typingctx):
        def codegen(context, builder, sig, args):
            return ir.Constant(llvm, None)

        return vector(), codegen

    def make_zeros(number):
        """``zeros() -> tuple`` of ``number`` vectors."""

        @intrinsic
        def zero_vectors(typingctx):
            def codegen(context, builder, sig, args):
                return context.make_tuple(builder, sig.return_type, [ir.Constant(llvm, None)] * number)

            return types.UniTuple(vector, number)(), codegen

        return zero_vectors

    @intrinsic
    def load_four(typingctx, address):
        """Four adjacent vectors, as a tuple."""

        def codegen(context, builder, sig, args):
            pointers = [builder.inttoptr(builder.add(args[0], I64(v * lanes * size)), PTR) for v in range(4)]
            vectors = [builder.load(pointer, typ=llvm, align=size) for pointer in pointers]
            return context.make_tuple(builder, sig.return_type, vectors)

        return types.UniTuple(vector, 4)(types.int64), codegen

    @intrinsic
    def square_sum(typingctx, value):
        def codegen(context, builder, sig, args):
            wide = widen_to_double(builder, args[0])
            return sum_lanes(builder, builder.fmul(wide, wide))

        return types.float64(vector), codegen

    return {
        "load": load, "store": store, "zeros": zeros, "make_zeros": make_zeros, "zero_four": make_zeros(4),
        "load_four": load_four, "square_sum": square_sum,
    }  # fmt: skip


def _mask(builder, count, lanes):
    iota = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", iota, splat(builder, builder.trunc(count, I32), lanes))


def _in_memory(vector: Vector, storage: str) -> tuple[ir.Type, str]:
    """LLVM's type of a vector's values in ``storage``, and its suffix in the names of intrinsics."""
    if storage == vector.scalar:
        return vector.llvm, f"v{vector.lanes}f{SIZE[storage] * 8}"
    return ir.VectorType(I16, vector.lanes), f"v{vector.lanes}i16"


def _emit_store(builder, vector, storage, address, value, count):
    """Writes the first ``count`` lanes."""
    lanes = vector.lanes
    pointer = builder.inttoptr(address, PTR)
    if storage != vector.scalar:
        value = narrow(builder, value, storage, lanes)
    whole = builder.icmp_signed(">=", count, I64(lanes))
    with builder.if_else(whole, likely=True) as (then, other):
        with then:
            builder.store(value, pointer, align=SIZE[storage])
        with other:
            align = ir.Constant(I32, SIZE[storage])
            some = _mask(builder, count, lanes)
            name = f"llvm.masked.store.{_in_memory(vector, storage)[1]}.p0"
            llvm_call(builder, name, ir.VoidType(), [value, pointer, align, some])


def partial_vectors(vector: Vector) -> dict[str, Callable]:
    """``make_load(storage)``, ``make_store(storage)``, ``first_lanes(v, count)``.

    The first two give loads and stores of the first ``count`` lanes from and to memory of dtype ``storage``; other
    lanes load as zero and are not written.
    """
    scalar, lanes, llvm = vector.scalar, vector.lanes, vector.llvm

    @intrinsic
    def first_lanes(typingctx, value, count):
        def codegen(context, builder, sig, args):
            return builder.select(_mask(builder, args[1], lanes), args[0], ir.Constant(llvm, None))

        return vector(vector, types.int64), codegen

    def make_load(storage):
        memory, suffix = _in_memory(vector, storage)

        @intrinsic
        def load_first(typingctx, address, count):
            def codegen(context, builder, sig, args):
                address, count = args
                pointer = builder.inttoptr(address, PTR)
                whole = builder.icmp_signed(">=", count, I64(lanes))
                with builder.if_else(whole, likely=True) as (then, other):
                    with then:
                        full = builder.load(pointer, typ=memory, align=SIZE[storage])
                        after_full = builder.block
                    with other:
                        zero = ir.Constant(memory, None)
                        align = ir.Constant(I32, SIZE[storage])
                        some = _mask(builder, count, lanes)
                        name = f"llvm.masked.load.{suffix}.p0"
                        part = llvm_call(builder, name, memory, [pointer, align, some, zero])
                        after_part = builder.block
                value = builder.phi(memory)
                value.add_incoming(full, after_full)
                value.add_incoming(part, after_part)
                return value if storage == scalar else widen(builder, value, storage, lanes)

            return vector(types.int64, types.int64), codegen

        return load_first

    def make_store(storage):
        @intrinsic
        def store_first(typingctx, address, value, count):
            def codegen(context, builder, sig, args):
                _emit_store(builder, vector, storage, *args)
                return context.get_dummy_value()

            return types.void(types.int64, vector, types.int64), codegen

        return store_first

    return {"first_lanes": first_lanes, "make_load": make_load, "make_store": make_store}


def _load_bits(builder, address, count, lanes):
    """``count`` 16-bit integers as lanes of 32 bits, the rest zero."""
    memory = ir.VectorType(I16, lanes)
    some, zero = _mask(builder, count, lanes), ir.Constant(memory, None)
    pointer = builder.inttoptr(address, PTR)
    bits = llvm_call(builder, f"llvm.masked.load.v{lanes}i16.p0", memory, [pointer, ir.Constant(I32, 2), some, zero])
    return builder.zext(bits, ir.VectorType(I32, lanes))


def pairs(vector: Vector) -> dict[str, Callable]:
    """For float32: ``load_pairs`` and ``store_half`` of vectors whose lanes are pairs of bfloat16 values, the first one
    low; ``pair_tile`` of tiles of them.  Only dot products and tiles read the values; else a lane is 32 bits."""
    lanes, llvm = vector.lanes, vector.llvm
    bits = ir.VectorType(I32, lanes)

    def paired(builder, first, first_count, second, second_count):
        low, high = (_load_bits(builder, at, n, lanes) for at, n in ((first, first_count), (second, second_count)))
        both = builder.or_(low, builder.shl(high, splat(builder, I32(16), lanes)))
        return builder.bitcast(both, llvm)

    @intrinsic
    def load_pairs(typingctx, first, first_count, second, second_count):
        """Pairs of values of two rows of bfloat16, of which so many are read; the rest counts as zero."""

        def codegen(context, builder, sig, args):
            return paired(builder, *args)

        return vector(*[types.int64] * 4), codegen

    @intrinsic
    def store_half(typingctx, address, value, second):
        """Rounds ``value`` to bfloat16 and writes it as the first or, if ``second`` is 1, second values of pairs."""

        def codegen(context, builder, sig, args):
            address, value, second = args
            wide = builder.zext(narrow(builder, value, "bfloat16", lanes), bits)
            shift = splat(builder, builder.shl(builder.trunc(second, I32), I32(4)), lanes)
            halves = builder.bitcast(builder.shl(wide, shift), ir.VectorType(I16, 2 * lanes))
            mask = ir.VectorType(ir.IntType(1), 2 * lanes)
            low, high = (ir.Constant(mask, [(lane + odd + 1) % 2 for lane in range(2 * lanes)]) for odd in (0, 1))
            some = builder.select(builder.icmp_signed("==", second, I64(0)), low, high)
            pointer, align = builder.inttoptr(address, PTR), ir.Constant(I32, 4)
            llvm_call(builder, f"llvm.masked.store.v{2 * lanes}i16.p0", ir.VoidType(), [halves, pointer, align, some])
            return context.get_dummy_value()

        return types.void(types.int64, vector, types.int64), codegen

    @intrinsic
    def pair_tile(typingctx, target, rows, offset, count):
        """Writes a tile of pairs: row i has value ``i`` of each of ``2 * lanes`` rows of bfloat16.

        ``rows``: where their addresses are, which are ``offset`` bytes before the first value; ``count`` values are
        read, the rest counts as zero.
        """

        def codegen(context, builder, sig, args):
            target, rows, offset, count = args
            table = builder.inttoptr(rows, PTR)
            at = [
                builder.add(builder.load(builder.gep(table, [I64(i)], source_etype=I64), typ=I64, align=8), offset)
                for i in range(2 * lanes)
            ]
            both = zip(at[::2], at[1::2], strict=True)
            columns = [paired(builder, first, count, second, count) for first, second in both]
            for i, row in enumerate(_transposed(builder, columns)):
                builder.store(row, builder.inttoptr(builder.add(target, I64(4 * lanes * i)), PTR), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return {"load_pairs": load_pairs, "store_half": store_half, "pair_tile": pair_tile}


def _transposed(builder, rows):
    """The columns of a tile of as many rows as they have lanes.

    Swaps off-diagonal squares of one lane, then of two, four and so on: two shuffles per pair of rows.
    """
    rows, lanes, step = list(rows), len(rows), 1
    order = ir.VectorType(I32, lanes)
    while step < lanes:
        upper = [j if not j & step else lanes + j - step for j in range(lanes)]
        lower = [j + step if not j & step else lanes + j for j in range(lanes)]
        for i in range(lanes):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(order, upper))
                rows[i + step] = builder.shuffle_vector(a, b, ir.Constant(order, lower))
        step *= 2
    return rows


def adjacent_vectors(vector: Vector) -> dict[str, Callable]:
    """``add_vectors`` and ``store_vectors``: of a tuple of vectors, to adjacent memory."""
    scalar, lanes, size, llvm = vector.scalar, vector.lanes, SIZE[vector.scalar], vector.llvm
    suffix = _in_memory(vector, scalar)[1]

    @intrinsic
    def add_vectors(typingctx, address, values, count, wanted):
        """Adds ``count`` values of a tuple of vectors to adjacent memory; if not ``wanted``, writes them instead."""

        def codegen(context, builder, sig, args):
            address, values, count, wanted = args
            valid = builder.select(builder.icmp_signed("!=", wanted, I64(0)), count, I64(0))
            zero, align = ir.Constant(llvm, None), ir.Constant(I32, size)
            for v in range(sig.args[1].count):
                here = builder.add(address, I64(v * lanes * size))
                some = _mask(builder, builder.sub(valid, I64(v * lanes)), lanes)
                pointer = builder.inttoptr(here, PTR)
                before = llvm_call(builder, f"llvm.masked.load.{suffix}.p0", llvm, [pointer, align, some, zero])
                total = builder.fadd(before, builder.extract_value(values, v))
                _emit_store(builder, vector, scalar, here, total, builder.sub(count, I64(v * lanes)))
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64, types.int64), codegen

    @intrinsic
    def store_vectors(typingctx, address, values, count):
        """Writes the first ``count`` values of a tuple of vectors to adjacent memory; the rest is left alone."""

        def codegen(context, builder, sig, args):
            address, values, count = args
            for v in range(sig.args[1].count):
                here = builder.add(address, I64(v * lanes * size))
                left = builder.sub(count, I64(v * lanes))
                _emit_store(builder, vector, scalar, here, builder.extract_value(values, v), left)
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), codegen

    return {"add_vectors": add_vectors, "store_vectors": store_vectors}


def tiles(vector: Vector) -> dict[str, Callable]:
    """``transpose_tile`` and ``copy_one``, for packing."""
    lanes, size, llvm = vector.lanes, SIZE[vector.scalar], vector.llvm

    @intrinsic
    def transpose_tile(typingctx, target, target_row, source, source_row):
        """Writes the transpose of a (lanes, lanes) tile; rows are ``source_row`` and ``target_row`` bytes apart."""

        def codegen(context, builder, sig, args):
            target, target_row, source, source_row = args
            rows = [
                builder.load(
                    builder.inttoptr(builder.add(source, builder.mul(source_row, I64(i))), PTR), typ=llvm, align=2
                )
                for i in range(lanes)
            ]
            for i, row in enumerate(_transposed(builder, rows)):
                at = builder.add(target, builder.mul(target_row, I64(i)))
                builder.store(row, builder.inttoptr(at, PTR), align=size)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def copy_one(typingctx, target, source):
        """Copies one value."""

        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[1], PTR), typ=llvm.element, align=2)
            builder.store(value, builder.inttoptr(args[0], PTR), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic
    def copy_half(typingctx, target, source):
        """Copies a value of 16 bits."""

        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[1], PTR), typ=I16, align=2)
            builder.store(value, builder.inttoptr(args[0], PTR), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return {"transpose_tile": transpose_tile, "copy_one": copy_one, "copy_half": copy_half}
