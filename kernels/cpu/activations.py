"""tanh and sigmoid on vectors.

Both use 2^t of t = x / ln 2 (sigmoid: -x, tanh: 2x)::

    2^t = 2^n 2^f,  n = round(t),  f = t - n,  2^f = 1 + f q(f)
    sigmoid(x) = 1 / (1 + 2^t);   tanh(x) = m / (m + 2),  m = 2^t - 1 = 2^n f q(f) + (2^n - 1)

The second form of m keeps tanh accurate near zero, where 1 - 2 / (2^t + 1) would cancel.  q is the Chebyshev fit of
(2^f - 1) / f on |f| <= 1/2: degree 5 (error 1.2e-8) for float32, degree 10 (1e-17) for float64; ``mpmath.chebyfit``
reproduces the coefficients.  Both are within 2 units in the last place where the result is not denormal and |x| < 10.
With AVX-512 the reciprocal is the 14-bit estimate and one Newton step (float64: two): a 512-bit division takes 16
cycles on Intel's cores, and five of them would double the time of the cell.  Sigmoid takes 16 instructions, tanh 19;
with base e they took 22 and 24.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .jit import inline
from .vector import I32, I64, SIZE, Vector, fma, join, joining, llvm_call, splat, split

# magic: 1.5 * 2^mantissa bits; adding it to a value rounds that to an integer.  1 / ln 2 as a sum of two numbers
# (float32 needs only the first).  Beyond its limit sigmoid is 0 (exactly: a denormal) and tanh is 1 to the last bit.
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


def _estimate(builder, vector):
    """AVX-512's 14-bit estimate of 1 / x, on a whole register."""
    count = vector.type.count
    everywhere = ir.Constant(ir.IntType(count), (1 << count) - 1)
    name = f"llvm.x86.avx512.rcp14.{'ps' if count == 16 else 'pd'}.512"
    return llvm_call(builder, name, vector.type, [vector, ir.Constant(vector.type, None), everywhere])


def _exponents(vector: Vector) -> SimpleNamespace:
    """Powers of two, and bounds on their exponents."""
    scalar, lanes, llvm = vector.scalar, vector.lanes, vector.llvm
    integer = ir.VectorType(I32 if scalar == "float32" else I64, lanes)
    int_element, mantissa = integer.element, 23 if scalar == "float32" else 52
    real = getattr(types, scalar)

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

    return SimpleNamespace(
        power_of_two=power_of_two, times_power=times_power, zero_below=zero_below, at_least=bound("<"),
        at_most=bound(">"),
    )  # fmt: skip


def _polynomial(vector: Vector, fast_reciprocal: bool) -> tuple[Any, Any]:
    """``series(f)`` and ``reciprocal(v)``."""
    scalar, lanes, llvm, size = vector.scalar, vector.lanes, vector.llvm, SIZE[vector.scalar]
    constants = EXP2[scalar]

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

    @intrinsic
    def series(typingctx, f):
        """q(f), by Horner's rule."""

        def codegen(context, builder, sig, args):
            first, *rest = (splat(builder, ir.Constant(llvm.element, c), lanes) for c in constants.series)
            return functools.reduce(lambda q, c: fma(builder, q, args[0], c), rest, first)

        return vector(vector), codegen

    return series, reciprocal


def _make_fraction(scalar: str) -> Any:
    """``fraction(x, scale, shifted)``."""
    constants = EXP2[scalar]
    magic, inverse_ln2, inverse_ln2_low = constants.magic, constants.inverse_ln2, constants.inverse_ln2_low

    @inline
    def fraction(x, scale, shifted):
        """f for t = x * scale, with the integer n in ``shifted``."""
        f = x * scale - (shifted - magic)
        return f + x * (scale / inverse_ln2 * inverse_ln2_low) if inverse_ln2_low != 0.0 else f

    return fraction


def _make_tanh(vector: Vector, fast_reciprocal: bool) -> Any:
    """``tanh(v)``."""
    constants, exponents, fraction = EXP2[vector.scalar], _exponents(vector), _make_fraction(vector.scalar)
    magic, inverse_ln2, tanh_limit = constants.magic, constants.inverse_ln2, constants.tanh_limit
    power_of_two, at_least, at_most = exponents.power_of_two, exponents.at_least, exponents.at_most
    series, reciprocal = _polynomial(vector, fast_reciprocal)

    @inline
    def tanh(x):
        x = at_least(at_most(x, tanh_limit), -tanh_limit)
        shifted = x * (2.0 * inverse_ln2) + magic
        f = fraction(x, 2.0 * inverse_ln2, shifted)
        power = power_of_two(shifted)
        m = power * (f * series(f)) + (power - 1.0)
        return m * reciprocal(m + 2.0)

    return tanh


def _make_gates(vector: Vector, fast_reciprocal: bool) -> Any:
    """``gates(z_i, z_f, z_g, z_o)``: all four activations interleaved, which overlaps their dependency chains."""
    constants, exponents, fraction = EXP2[vector.scalar], _exponents(vector), _make_fraction(vector.scalar)
    magic, inverse_ln2 = constants.magic, constants.inverse_ln2
    sigmoid_limit, tanh_limit = constants.sigmoid_limit, constants.tanh_limit
    power_of_two, times_power, zero_below = exponents.power_of_two, exponents.times_power, exponents.zero_below
    at_least, at_most = exponents.at_least, exponents.at_most
    join_four, split_four = joining(vector, 4)
    wide_series, wide_reciprocal = _polynomial(Vector(vector.scalar, 4 * vector.lanes), fast_reciprocal)

    @inline
    def gates(z_i, z_f, z_g, z_o):
        i, f, o = at_most(z_i, sigmoid_limit), at_most(z_f, sigmoid_limit), at_most(z_o, sigmoid_limit)
        g = at_least(at_most(z_g, tanh_limit), -tanh_limit)
        n_i, n_f, n_o = i * -inverse_ln2 + magic, f * -inverse_ln2 + magic, o * -inverse_ln2 + magic
        n_g = g * (2.0 * inverse_ln2) + magic
        i, f = fraction(i, -inverse_ln2, n_i), fraction(f, -inverse_ln2, n_f)
        g, o = fraction(g, 2.0 * inverse_ln2, n_g), fraction(o, -inverse_ln2, n_o)
        t = join_four((i, f, g, o))
        i, f, g, o = split_four(t * wide_series(t))
        power = power_of_two(n_g)
        m = power * g + (power - 1.0)
        i, f, o = times_power(i + 1.0, n_i) + 1.0, times_power(f + 1.0, n_f) + 1.0, times_power(o + 1.0, n_o) + 1.0
        i, f, g, o = split_four(wide_reciprocal(join_four((i, f, m + 2.0, o))))
        return (
            zero_below(i, z_i, -sigmoid_limit), zero_below(f, z_f, -sigmoid_limit), m * g,
            zero_below(o, z_o, -sigmoid_limit),
        )  # fmt: skip

    return gates


def activations(vector: Vector, fast_reciprocal: bool) -> dict[str, Callable]:
    """``tanh`` and ``gates``; ``fast_reciprocal`` needs AVX-512 and whole registers of it."""
    return {"tanh": _make_tanh(vector, fast_reciprocal), "gates": _make_gates(vector, fast_reciprocal)}
