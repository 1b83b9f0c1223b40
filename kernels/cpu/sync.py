"""The barriers of a launch: one counter, incremented atomically.

A thread that arrives adds one and waits until all have: the counter only grows, so there is nothing to reset.  It
spins, because a barrier has to take less than a time step (a few hundred nanoseconds); after a while it yields the
processor in each iteration, so that a thread that lost its core to another process can run and the launch continues.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .jit import inline
from .threads import OPEN
from .vector import I32, I64, PTR

PATIENCE = 2000  # loads of the counter before yielding: some tens of microseconds


@intrinsic
def _add(typingctx, address, value):
    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], PTR), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _look(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.inttoptr(args[0], PTR), "acquire", 8, typ=I64)

    return types.int64(types.int64), codegen


@intrinsic
def _relax(typingctx):
    """Tells the processor that this is a spin loop, if it has an instruction for that."""
    machine = platform.machine().lower()

    def codegen(context, builder, sig, args):
        void = ir.VoidType()
        if machine in ("x86_64", "amd64"):
            name, argument_types, values = "llvm.x86.sse2.pause", [], []
        elif machine in ("aarch64", "arm64"):
            name, argument_types, values = "llvm.aarch64.hint", [I32], [I32(1)]
        else:
            return context.get_dummy_value()
        function = builder.module.globals.get(name)
        builder.call(function or ir.Function(builder.module, ir.FunctionType(void, argument_types), name), values)
        return context.get_dummy_value()

    return types.void(), codegen


_yield = types.ExternalFunction("sched_yield", types.int32())


@inline
def arrive_and_wait(counter, members, index):
    """Waits at barrier ``index`` (1, 2, ...) of the launch for all ``members`` threads."""
    if members > 1:
        _add(counter, 1)
        looks = 0
        while _look(counter) < members * index:
            looks += 1
            if looks > PATIENCE:
                _yield()
            else:
                _relax()


@inline
def meet(a, passed):
    """Waits at the launch's next barrier; a: the member's arguments; returns ``passed``, barriers so far, plus 1."""
    arrive_and_wait(a.counter, a.members, passed + 1)
    return passed + 1


@inline
def my_turn(a):
    """Waits, in a wavefront, for the launches that this one continues or reads; False if they were abandoned.

    A thread takes its launches in an order in which each depends on earlier ones only, so one of them can always run.
    """
    looks = 0
    while a.done != 0 and (_look(a.done) < a.turn or (a.done_before != 0 and _look(a.done_before) <= a.turn)):
        if _look(a.counter) >= OPEN:
            return False
        looks += 1
        if looks > PATIENCE:
            _yield()
        else:
            _relax()
    return True


@inline
def end_turn(a):
    """Lets those continue that wait for this launch of a wavefront."""
    if a.done != 0:
        _add(a.done, 1)


@inline
def opened(a):
    """Whether the barriers of a launch were released because a member did not start."""
    return a.members > 1 and _look(a.counter) >= OPEN
