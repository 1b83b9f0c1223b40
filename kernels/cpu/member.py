"""The compiled function that calls the kernel with a member's arguments; see ``team.py``."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .arguments import Head
from .jit import kernel
from .memory import make_read, store_int
from .vector import I32, I64


@intrinsic
def _call_int(typingctx, function):
    """The result of the C function ``int f(void)`` at address ``function``."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(pointer, []), I64)

    return types.int64(types.int64), codegen


@intrinsic
def _call_address(typingctx, function, argument):
    """Calls the C function ``void f(int64_t)`` at address ``function``."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [I64]).as_pointer())
        builder.call(pointer, [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@functools.cache
def member_kernel() -> Any:
    read = make_read(Head)
    size_at = 8 * Head._fields.index("size")

    @kernel("")
    def lstm_member_kernel(address):
        head = read(address)
        number, size = _call_int(head.thread_num), _call_int(head.num_threads)
        if number == 0:
            store_int(address + size_at, size)
        if size >= head.members and number < head.members:
            _call_address(head.function, head.arguments + number * head.stride)

    return lstm_member_kernel
