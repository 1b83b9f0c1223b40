"""A vector type for Numba: LLVM vectors, and code generation for them.

The machine runs what the source says: nothing is left to the loop vectoriser, which made the cell eight times slower.
Lanes need not match the machine: LLVM splits a wide vector, at the cost of registers; ``tiling.py`` chooses.

Arithmetic carries LLVM's ``contract`` flag: ``a * b + c`` may become one fused multiply-add.  Nothing else is
relaxed, so NaN and Inf behave as in the formula.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global

from .products import native_bfloat16

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
PTR = ir.PointerType()
LLVM_SCALAR = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
CONTRACT = ("contract",)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for: the element of what instructions of bfloat16 take and give."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_BFLOAT = _BFloat()


class Vector(types.Type):
    """Numba's type of an LLVM vector of ``lanes`` values of ``scalar``."""

    def __init__(self, scalar: str, lanes: int):
        self.scalar, self.lanes = scalar, lanes
        self.llvm = ir.VectorType(LLVM_SCALAR[scalar], lanes)
        super().__init__(name=f"vector({lanes} x {scalar})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


def splat(builder, value, lanes):
    """A vector with ``value`` in all lanes."""
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def llvm_call(builder, name, result, args):
    """Calls the LLVM intrinsic ``name`` (llvmlite has no overloads for vectors, so it is declared by name)."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def prefetch(builder, address, near):
    """Prefetches a cache line into the first-level cache (near) or the second."""
    arguments = [builder.inttoptr(address, PTR), I32(0), I32(3 if near else 2), I32(1)]
    llvm_call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    width = f"v{a.type.count}f{32 if a.type.element == ir.FloatType() else 64}"
    return llvm_call(builder, f"llvm.fma.{width}", a.type, [a, b, c])


def pair_values(builder, pairs):
    """(first, second) values as float32 lanes, of float32 lanes that hold pairs of bfloat16."""
    count, vector = pairs.type.count, pairs.type
    bits = builder.bitcast(pairs, ir.VectorType(I32, count))
    first = builder.shl(bits, splat(builder, I32(16), count))
    second = builder.and_(bits, splat(builder, I32(-65536), count))
    return builder.bitcast(first, vector), builder.bitcast(second, vector)


def dot_pairs(builder, a, b, c, emulated):
    """c + a . b of float32 lanes that hold pairs of bfloat16, as VDPBF16PS rounds it: the second product first."""
    if emulated:
        (a_first, a_second), (b_first, b_second) = pair_values(builder, a), pair_values(builder, b)
        return fma(builder, a_first, b_first, fma(builder, a_second, b_second, c))
    pairs = ir.VectorType(_BFLOAT, 2 * a.type.count)
    operands = [c, builder.bitcast(a, pairs), builder.bitcast(b, pairs)]
    return llvm_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", c.type, operands)


def _operator(op, emit):
    """Teaches Numba ``op`` on two vectors, or on a vector and a scalar."""

    class VectorOperator(AbstractTemplate):
        key = op

        def generic(self, args, kws):
            vectors = [a for a in args if isinstance(a, Vector)]
            if len(args) == 2 and vectors and all(isinstance(a, (Vector, types.Float)) for a in args):
                return signature(vectors[0], *args)
            return None

    infer_global(op)(VectorOperator)

    def lower(context, builder, sig, args):
        def vector(value, given):
            if isinstance(given, Vector):
                return value
            scalar = context.cast(builder, value, given, getattr(types, sig.return_type.scalar))
            return splat(builder, scalar, sig.return_type.lanes)

        a, b = (vector(v, k) for v, k in zip(args, sig.args, strict=True))
        return emit(builder)(a, b, flags=CONTRACT)

    for operands in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *operands)(lower)


_operator(operator.add, lambda builder: builder.fadd)
_operator(operator.sub, lambda builder: builder.fsub)
_operator(operator.mul, lambda builder: builder.fmul)


def widen_to_double(builder, value):
    """float64 lanes from float32 or float64 ones."""
    if value.type.element == ir.DoubleType():
        return value
    return builder.fpext(value, ir.VectorType(ir.DoubleType(), value.type.count))


def sum_lanes(builder, value):
    """The sum of all lanes, in a fixed order: halves, halves of these, ..."""
    while value.type.count > 1:
        value = builder.fadd(*split(builder, value, 2))
    return builder.extract_element(value, I32(0))


def widen(builder, bits, storage, lanes):
    """float32 lanes from 16-bit storage (as integers)."""
    if storage == "bfloat16":
        wide = builder.zext(bits, ir.VectorType(I32, lanes))
        return builder.bitcast(builder.shl(wide, splat(builder, I32(16), lanes)), ir.VectorType(ir.FloatType(), lanes))
    return builder.fpext(
        builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(ir.FloatType(), lanes)
    )


def narrow(builder, value, storage, lanes):
    """16-bit storage (as integers) from float32 lanes, rounded to nearest even; NaN stays NaN.

    The instruction for it counts denormal numbers as zero, the other ways do where the mode says so (``mode.py``).
    """
    if storage == "float16":
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
        return builder.bitcast(half, ir.VectorType(I16, lanes))
    if lanes == 16 and native_bfloat16():
        rounded = llvm_call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFLOAT, 16), [value])
        return builder.bitcast(rounded, ir.VectorType(I16, lanes))
    wide = ir.VectorType(I32, lanes)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, splat(builder, I32(16), lanes)), splat(builder, I32(1), lanes))
    rounded = builder.add(bits, builder.add(odd, splat(builder, I32(0x7FFF), lanes)))
    quiet = builder.or_(bits, splat(builder, I32(0x400000), lanes))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, splat(builder, I32(16), lanes)), ir.VectorType(I16, lanes))


def join(builder, vectors):
    """One vector of all the lanes of ``vectors``, whose number is a power of two."""
    while len(vectors) > 1:
        lanes = ir.Constant(ir.VectorType(I32, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(a, b, lanes) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def split(builder, vector, parts):
    """``vector`` in ``parts`` equal vectors."""
    count = vector.type.count // parts
    nothing = ir.Constant(vector.type, ir.Undefined)
    if parts == 1:
        return [vector]
    return [
        builder.shuffle_vector(vector, nothing, ir.Constant(ir.VectorType(I32, count), list(range(at, at + count))))
        for at in range(0, vector.type.count, count)
    ]


def joining(vector: Vector, number: int) -> tuple[Callable, Callable]:
    """For kernels: (a tuple of ``number`` vectors to one, the inverse)."""
    tuple_type, wide = types.UniTuple(vector, number), Vector(vector.scalar, number * vector.lanes)

    @intrinsic
    def join_vectors(typingctx, vectors):
        def codegen(context, builder, sig, args):
            return join(builder, [builder.extract_value(args[0], i) for i in range(number)])

        return wide(tuple_type), codegen

    @intrinsic
    def split_vector(typingctx, value):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, split(builder, args[0], number))

        return tuple_type(wide), codegen

    return join_vectors, split_vector
