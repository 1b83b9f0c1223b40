"""The processor's floating-point mode: whether denormal numbers count as zero."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .vector import I32, I64, llvm_call

# The bits of the floating-point mode that make denormal numbers count as zero: FTZ and DAZ of x86's MXCSR, FZ of ARM's
# FPCR.
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
