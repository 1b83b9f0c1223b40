"""How a kernel gets its arguments: the address of a record, whose fields both sides know by name.

A record is a NamedTuple of int64 (counts, bytes, addresses; 0 where absent).  The host makes one a member
(``threads.run``); the kernel reads it once, when it begins, so that what it knows stays in registers, or on its stack,
whatever it writes elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .simd import I64, PTR


@functools.cache
def make_read(record: type) -> Callable:
    """A function for kernels: the ``record`` at an address."""
    fields = len(record._fields)  # type: ignore[attr-defined]
    kind = types.NamedUniTuple(types.int64, fields, record)

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            base = builder.inttoptr(args[0], PTR)
            addresses = [builder.gep(base, [ir.Constant(I64, i)], source_etype=I64) for i in range(fields)]
            return context.make_tuple(builder, kind, [builder.load(at, typ=I64, align=8) for at in addresses])

        return kind(types.int64), codegen

    return read
