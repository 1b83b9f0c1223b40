"""A vector type for Numba: LLVM vectors with load, store, arithmetic, tanh and sigmoid.

``simd(scalar, lanes)`` gives the operations on vectors of ``lanes`` values of ``scalar`` ("float32" or "float64").
They are Numba intrinsics that emit LLVM's own vector instructions, so what the source says is what the machine runs:
nothing is left to the loop vectoriser (which made the cell eight times slower when it was asked to).  Lanes need not
match the machine: LLVM splits a wide vector, at the price of registers; ``tiling.py`` chooses.

Addresses are int64 bytes, as ``Tensor.data_ptr()`` gives them; no alignment beyond the scalar's is assumed.

Arithmetic carries LLVM's ``contract`` flag: ``a * b + c`` may become one fused multiply-add.  Nothing else is
relaxed, so NaN and Inf behave as in the formula.

Activations.  Both rest on 2^t of t = x / ln 2 (sigmoid: -x, tanh: 2x)::

    2^t = 2^n 2^f,  n = round(t),  f = t - n,  2^f = 1 + f q(f)
    sigmoid(x) = 1 / (1 + 2^t);   tanh(x) = m / (m + 2),  m = 2^t - 1 = 2^n f q(f) + (2^n - 1)

The second form of m keeps tanh accurate near zero, where 1 - 2 / (2^t + 1) would cancel.  q is the Chebyshev fit of
(2^f - 1) / f on |f| <= 1/2: degree 5 (error 1.2e-8) for float32, degree 10 (1e-17) for float64; ``mpmath.chebyfit``
reproduces the coefficients.  Both are within 2 units in the last place where the result is not denormal and |x| < 10.
With AVX-512 the reciprocal is the 14-bit estimate and one Newton step (float64: two): a 512-bit division takes 16
cycles on Intel's cores, five of them would double the cell.  16 instructions a sigmoid, 19 a tanh; forms on base e
took 22 and 24.
"""

from __future__ import annotations

import functools
import operator
import platform
from types import SimpleNamespace

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global

from .jit import inline

I1, I16, I32, I64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
PTR = ir.PointerType()
LLVM_SCALAR = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
CONTRACT = ("contract",)


# magic: 1.5 * 2^mantissa bits, which rounds what is added to it to an integer.  1 / ln 2 in two parts (float32 does
# without the second).  Beyond its limit sigmoid is 0 (a denormal, exactly) and tanh is 1 to the last bit.
EXP2 = {
    "float32": SimpleNamespace(
        magic=12582912.0, inverse_ln2=1.4426950408889634, inverse_ln2_low=0.0, sigmoid_limit=87.0, tanh_limit=9.1,
        series=(0.00015453222611639, 0.00133909322808601, 0.00961808244534843, 0.05550356984941641,
        0.24022650760801401, 0.69314718805317025),
    ),
    "float64": SimpleNamespace(
        magic=6755399441055744.0, inverse_ln2=1.4426950408889634, inverse_ln2_low=2.0355273740931032e-17,
        sigmoid_limit=708.0, tanh_limit=19.1,
        series=(
            4.4549719197075452844e-10, 7.0726071893649128497e-9, 1.0178062389205206401e-7, 1.3215442481659663991e-6,
            0.000015252733829929097971, 0.00015403530441910486318, 0.0013333558146416879934, 0.0096181291076067846376,
            0.055504108664821594425, 0.24022650695910098382, 0.69314718055994530942,
        ),
    ),
}  # fmt: skip


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


def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    width = f"v{a.type.count}f{32 if a.type.element == ir.FloatType() else 64}"
    return llvm_call(builder, f"llvm.fma.{width}", a.type, [a, b, c])


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
        def vector(value, kind):
            if isinstance(kind, Vector):
                return value
            scalar = context.cast(builder, value, kind, getattr(types, sig.return_type.scalar))
            return splat(builder, scalar, sig.return_type.lanes)

        a, b = (vector(v, k) for v, k in zip(args, sig.args, strict=True))
        return emit(builder)(a, b, flags=CONTRACT)

    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *kinds)(lower)


_operator(operator.add, lambda builder: builder.fadd)
_operator(operator.sub, lambda builder: builder.fsub)
_operator(operator.mul, lambda builder: builder.fmul)


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
    """Asks for the cache line at ``address``, which need not be mapped."""

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


# Where a processor's floating-point mode says that denormal numbers count as zero: FTZ and DAZ of x86's MXCSR, FZ of
# ARM's FPCR.
_MACHINE = platform.machine().lower()
_FLUSH = {"x86_64": 0x8040, "amd64": 0x8040, "aarch64": 1 << 24, "arm64": 1 << 24}.get(_MACHINE)


@intrinsic
def flush_denormals(typingctx):
    """From now on denormal numbers count as zero on this thread; returns its mode before, for :func:`set_mode`."""

    def codegen(context, builder, sig, args):
        if _FLUSH is None:
            return I64(0)
        if _FLUSH == 1 << 24:
            before = llvm_call(builder, "llvm.aarch64.get.fpcr", I64, [])
            llvm_call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [builder.or_(before, I64(_FLUSH))])
            return before
        address = builder.alloca(I32)
        llvm_call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [address])
        before = builder.load(address, typ=I32)
        builder.store(builder.or_(before, I32(_FLUSH)), address)
        llvm_call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [address])
        return builder.zext(before, I64)

    return types.int64(), codegen


@intrinsic
def set_mode(typingctx, mode):
    """Sets this thread's floating-point mode to what :func:`flush_denormals` returned."""

    def codegen(context, builder, sig, args):
        if _FLUSH == 1 << 24:
            llvm_call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [args[0]])
        elif _FLUSH is not None:
            address = builder.alloca(I32)
            builder.store(builder.trunc(args[0], I32), address)
            llvm_call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [address])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


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
    """16-bit storage (as integers) from float32 lanes, rounded to nearest even; NaN stays NaN."""
    if storage == "float16":
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
        return builder.bitcast(half, ir.VectorType(I16, lanes))
    wide = ir.VectorType(I32, lanes)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, splat(builder, I32(16), lanes)), splat(builder, I32(1), lanes))
    rounded = builder.add(bits, builder.add(odd, splat(builder, I32(0x7FFF), lanes)))
    quiet = builder.or_(bits, splat(builder, I32(0x400000), lanes))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, splat(builder, I32(16), lanes)), ir.VectorType(I16, lanes))


def join(builder, vectors):
    """One vector of all the lanes of ``vectors``, a power of two of them."""
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


def _estimate(builder, vector):
    """AVX-512's 14-bit estimate of 1 / x, on a whole register."""
    count = vector.type.count
    everywhere = ir.Constant(ir.IntType(count), (1 << count) - 1)
    name = f"llvm.x86.avx512.rcp14.{'ps' if count == 16 else 'pd'}.512"
    return llvm_call(builder, name, vector.type, [vector, ir.Constant(vector.type, None), everywhere])


@functools.cache
def simd(scalar: str, lanes: int, fast_reciprocal: bool = False) -> SimpleNamespace:
    """The operations on vectors of ``lanes`` x ``scalar``; ``fast_reciprocal`` needs AVX-512 and its lanes.

    ``load(address)``, ``store(address, v)``: all lanes.  ``make_load(storage)``, ``make_store(storage)``: loads and
    stores of the first ``count`` lanes from and to memory of dtype ``storage``; other lanes load as zero and are not
    written.
    ``zeros()``, ``square_sum(v)`` (over lanes, in float64 whatever the scalar: the squares of a vanishing gradient
    would underflow in float32), ``tanh(v)``, ``sigmoid(v)``.
    """
    vector = Vector(scalar, lanes)
    llvm = vector.llvm
    integer = ir.VectorType(I32 if scalar == "float32" else I64, lanes)
    int_element, mantissa = integer.element, 23 if scalar == "float32" else 52
    size = SIZE[scalar]
    real = getattr(types, scalar)

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

    zero_four = make_zeros(4)

    @intrinsic
    def load_four(typingctx, address):
        """Four adjacent vectors, as a tuple."""

        def codegen(context, builder, sig, args):
            pointers = [builder.inttoptr(builder.add(args[0], I64(v * lanes * size)), PTR) for v in range(4)]
            vectors = [builder.load(pointer, typ=llvm, align=size) for pointer in pointers]
            return context.make_tuple(builder, sig.return_type, vectors)

        return types.UniTuple(vector, 4)(types.int64), codegen

    @intrinsic
    def add_vectors(typingctx, address, values, count, wanted):
        """Adds ``count`` values of a tuple of vectors to adjacent memory; if not ``wanted``, writes them instead."""

        def codegen(context, builder, sig, args):
            address, values, count, wanted = args
            valid = builder.select(builder.icmp_signed("!=", wanted, I64(0)), count, I64(0))
            zero, align = ir.Constant(llvm, None), ir.Constant(I32, size)
            for v in range(sig.args[1].count):
                here = builder.add(address, I64(v * lanes * size))
                some = mask(builder, builder.sub(valid, I64(v * lanes)))
                pointer = builder.inttoptr(here, PTR)
                before = llvm_call(builder, f"llvm.masked.load.{suffix(scalar)}.p0", llvm, [pointer, align, some, zero])
                total = builder.fadd(before, builder.extract_value(values, v))
                emit_store(builder, scalar, here, total, builder.sub(count, I64(v * lanes)))
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
                emit_store(builder, scalar, here, builder.extract_value(values, v), left)
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), codegen

    @intrinsic
    def transpose_tile(typingctx, target, target_row, source, source_row):
        """Writes the transpose of a (lanes, lanes) tile; rows are ``source_row`` and ``target_row`` bytes apart.

        Blocks off the diagonal change places, of one lane, then of two, four and so on: two shuffles a pair.
        """

        def codegen(context, builder, sig, args):
            target, target_row, source, source_row = args
            rows = [
                builder.load(
                    builder.inttoptr(builder.add(source, builder.mul(source_row, I64(i))), PTR), typ=llvm, align=size
                )
                for i in range(lanes)
            ]
            step = 1
            while step < lanes:
                upper = [j if not j & step else lanes + j - step for j in range(lanes)]
                lower = [j + step if not j & step else lanes + j for j in range(lanes)]
                for i in range(lanes):
                    if not i & step:
                        a, b = rows[i], rows[i + step]
                        order = ir.VectorType(I32, lanes)
                        rows[i] = builder.shuffle_vector(a, b, ir.Constant(order, upper))
                        rows[i + step] = builder.shuffle_vector(a, b, ir.Constant(order, lower))
                step *= 2
            for i, row in enumerate(rows):
                at = builder.add(target, builder.mul(target_row, I64(i)))
                builder.store(row, builder.inttoptr(at, PTR), align=size)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def copy_one(typingctx, target, source):
        """Copies one value."""

        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[1], PTR), typ=llvm.element, align=size)
            builder.store(value, builder.inttoptr(args[0], PTR), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic
    def square_sum(typingctx, value):
        def codegen(context, builder, sig, args):
            wide = widen_to_double(builder, args[0])
            return sum_lanes(builder, builder.fmul(wide, wide))

        return types.float64(vector), codegen

    @intrinsic
    def first_lanes(typingctx, value, count):
        def codegen(context, builder, sig, args):
            return builder.select(mask(builder, args[1]), args[0], ir.Constant(llvm, None))

        return vector(vector, types.int64), codegen

    def mask(builder, count):
        iota = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        return builder.icmp_signed("<", iota, splat(builder, builder.trunc(count, I32), lanes))

    def stored(storage):
        return llvm if storage == scalar else ir.VectorType(I16, lanes)

    def suffix(storage):
        return f"v{lanes}f{size * 8}" if storage == scalar else f"v{lanes}i16"

    def make_load(storage):
        memory = stored(storage)

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
                        some = mask(builder, count)
                        name = f"llvm.masked.load.{suffix(storage)}.p0"
                        part = llvm_call(builder, name, memory, [pointer, align, some, zero])
                        after_part = builder.block
                value = builder.phi(memory)
                value.add_incoming(full, after_full)
                value.add_incoming(part, after_part)
                return value if storage == scalar else widen(builder, value, storage, lanes)

            return vector(types.int64, types.int64), codegen

        return load_first

    def emit_store(builder, storage, address, value, count):
        pointer = builder.inttoptr(address, PTR)
        if storage != scalar:
            value = narrow(builder, value, storage, lanes)
        whole = builder.icmp_signed(">=", count, I64(lanes))
        with builder.if_else(whole, likely=True) as (then, other):
            with then:
                builder.store(value, pointer, align=SIZE[storage])
            with other:
                align = ir.Constant(I32, SIZE[storage])
                some = mask(builder, count)
                name = f"llvm.masked.store.{suffix(storage)}.p0"
                llvm_call(builder, name, ir.VoidType(), [value, pointer, align, some])

    def make_store(storage):
        @intrinsic
        def store_first(typingctx, address, value, count):
            def codegen(context, builder, sig, args):
                emit_store(builder, storage, *args)
                return context.get_dummy_value()

            return types.void(types.int64, vector, types.int64), codegen

        return store_first

    @intrinsic
    def power_of_two(typingctx, shifted):
        """2^n from n + 1.5 * 2^mantissa: n sits in the low bits; the shift moves it into the exponent."""

        def codegen(context, builder, sig, args):
            bits = builder.bitcast(args[0], integer)
            one = 0x3F800000 if scalar == "float32" else 0x3FF0000000000000
            bits = builder.shl(bits, splat(builder, int_element(mantissa), lanes))
            return builder.bitcast(builder.add(bits, splat(builder, int_element(one), lanes)), llvm)

        return vector(vector), codegen

    def bound(comparison):
        """max (comparison "<") or min (">") of a vector and a scalar that lets NaN pass."""

        @intrinsic
        def clamp(typingctx, value, limit):
            def codegen(context, builder, sig, args):
                edge = splat(builder, context.cast(builder, args[1], types.float64, real), lanes)
                return builder.select(builder.fcmp_ordered(comparison, args[0], edge), edge, args[0])

            return vector(vector, types.float64), codegen

        return clamp

    @intrinsic
    def times_power(typingctx, value, shifted):
        """value 2^n, for a value in [1/2, 2]: n is added to its exponent."""

        def codegen(context, builder, sig, args):
            bits = builder.bitcast(args[1], integer)
            n = builder.shl(bits, splat(builder, int_element(mantissa), lanes))
            return builder.bitcast(builder.add(builder.bitcast(args[0], integer), n), llvm)

        return vector(vector, vector), codegen

    @intrinsic
    def zero_below(typingctx, result, value, limit):
        """``result`` where not ``value < limit``, else 0."""

        def codegen(context, builder, sig, args):
            edge = splat(builder, context.cast(builder, args[2], types.float64, real), lanes)
            return builder.select(builder.fcmp_ordered("<", args[1], edge), ir.Constant(llvm, None), args[0])

        return vector(vector, vector, types.float64), codegen

    @intrinsic
    def reciprocal(typingctx, value):
        def codegen(context, builder, sig, args):
            one = splat(builder, ir.Constant(llvm.element, 1.0), lanes)
            if not fast_reciprocal:
                return builder.fdiv(one, args[0])
            parts = split(builder, args[0], lanes * size // 64)
            estimate = join(builder, [_estimate(builder, part) for part in parts])
            for _ in range(1 if scalar == "float32" else 2):
                error = fma(builder, builder.fneg(args[0]), estimate, one)
                estimate = fma(builder, estimate, error, estimate)
            return estimate

        return vector(vector), codegen

    at_least, at_most = bound("<"), bound(">")

    constants = EXP2[scalar]
    magic, inverse_ln2, inverse_ln2_low = constants.magic, constants.inverse_ln2, constants.inverse_ln2_low
    sigmoid_limit, tanh_limit = constants.sigmoid_limit, constants.tanh_limit

    @intrinsic
    def series(typingctx, f):
        """q(f), by Horner's rule."""

        def codegen(context, builder, sig, args):
            first, *rest = (splat(builder, ir.Constant(llvm.element, c), lanes) for c in constants.series)
            return functools.reduce(lambda q, c: fma(builder, q, args[0], c), rest, first)

        return vector(vector), codegen

    @inline
    def fraction(x, scale, shifted):
        """f for t = x * scale, with the integer n in ``shifted``."""
        f = x * scale - (shifted - magic)
        return f + x * (scale / inverse_ln2 * inverse_ln2_low) if inverse_ln2_low != 0.0 else f

    @inline
    def tanh(x):
        x = at_least(at_most(x, tanh_limit), -tanh_limit)
        shifted = x * (2.0 * inverse_ln2) + magic
        f = fraction(x, 2.0 * inverse_ln2, shifted)
        power = power_of_two(shifted)
        m = power * (f * series(f)) + (power - 1.0)
        return m * reciprocal(m + 2.0)

    @inline
    def sigmoid(x):
        above = at_most(x, sigmoid_limit)
        shifted = above * -inverse_ln2 + magic
        f = fraction(above, -inverse_ln2, shifted)
        return zero_below(reciprocal(times_power(f * series(f) + 1.0, shifted) + 1.0), x, -sigmoid_limit)

    wide_vector = Vector(scalar, 4 * lanes)
    wide = simd(scalar, 4 * lanes, fast_reciprocal) if lanes * size <= 64 else None

    @intrinsic
    def join_four(typingctx, a, b, c, d):
        def codegen(context, builder, sig, args):
            return join(builder, args)

        return wide_vector(vector, vector, vector, vector), codegen

    @intrinsic
    def split_four(typingctx, value):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, split(builder, args[0], 4))

        return types.UniTuple(vector, 4)(wide_vector), codegen

    if wide is not None:
        wide_series, wide_reciprocal = wide.series, wide.reciprocal

        @inline
        def gates(z_i, z_f, z_g, z_o):
            i, f, o = at_most(z_i, sigmoid_limit), at_most(z_f, sigmoid_limit), at_most(z_o, sigmoid_limit)
            g = at_least(at_most(z_g, tanh_limit), -tanh_limit)
            n_i, n_f, n_o = i * -inverse_ln2 + magic, f * -inverse_ln2 + magic, o * -inverse_ln2 + magic
            n_g = g * (2.0 * inverse_ln2) + magic
            i, f = fraction(i, -inverse_ln2, n_i), fraction(f, -inverse_ln2, n_f)
            g, o = fraction(g, 2.0 * inverse_ln2, n_g), fraction(o, -inverse_ln2, n_o)
            t = join_four(i, f, g, o)
            i, f, g, o = split_four(t * wide_series(t))
            power = power_of_two(n_g)
            m = power * g + (power - 1.0)
            i, f, o = times_power(i + 1.0, n_i) + 1.0, times_power(f + 1.0, n_f) + 1.0, times_power(o + 1.0, n_o) + 1.0
            i, f, g, o = split_four(wide_reciprocal(join_four(i, f, m + 2.0, o)))
            return (
                zero_below(i, z_i, -sigmoid_limit), zero_below(f, z_f, -sigmoid_limit), m * g,
                zero_below(o, z_o, -sigmoid_limit),
            )  # fmt: skip
    else:
        gates = None  # type: ignore[assignment]

    return SimpleNamespace(
        vector=vector, scalar=scalar, lanes=lanes, size=size, load=load, store=store, zeros=zeros,
        make_zeros=make_zeros, add_vectors=add_vectors, zero_four=zero_four, load_four=load_four,
        store_vectors=store_vectors,
        square_sum=square_sum, first_lanes=first_lanes, make_load=make_load, make_store=make_store, tanh=tanh,
        sigmoid=sigmoid, gates=gates, series=series, reciprocal=reciprocal, transpose_tile=transpose_tile,
        copy_one=copy_one,
    )  # fmt: skip
