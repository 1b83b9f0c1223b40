"""The thread pool that runs the kernels.

Numba's own parallel layers do not serve: its workqueue aborts the process when two threads enter it, its OpenMP layer
dies in a forked child, and it loads a second OpenMP runtime beside torch's.  Here a launch is a list of calls of a
``nogil`` kernel, one a thread, the first on the caller's own; the others run on native threads that sleep on a queue
between launches.

Members of a launch wait for one another inside the kernel (``numba_sync.py``), so all of them have to run at once.  One
launch owns the whole pool; a caller that finds it taken is told so by :func:`available` and runs alone, which is also
the better use of the cores.  A forked child has none of its parent's threads: it starts with an empty pool.

An exception may strike between any two lines of Python: signal handlers run there (Ctrl-C), and raise.  So all that
must not be torn apart is one call of C code (see :func:`run`), and nothing has to be given back by a line that may not
come.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller

import numpy as np

from . import process

OPEN = 1 << 40  # added to a barrier's counter it lets everybody through; no launch has so many turns

_call = methodcaller("__call__")


def count() -> int:
    """Threads that a launch may use: torch's setting, but no more than there are cores to run them at once."""
    return min(process.torch_threads(), _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deeper(function: Callable, *arguments: int) -> None:
    """Calls ``function``, from one frame of the interpreter further down the stack of a thread of the pool.

    Called directly, one member of two took 1.6 times as long as the other (T = 500, B = 32, H = 128, alone, on an AMD
    EPYC with AVX2: 75 to 84 ms; so 44 to 52).  The likely cause, not proven: such a stack begins at the start of a
    page, and where the kernels' own variables lie in it as the rows that they load do, but for a multiple of 4096
    bytes, the processor takes loads for dependent on stores that are not.
    """
    function(*arguments)


class _Launch:
    """One call a member, and which of them are over.

    ``counters``: those of the barriers that its members wait at.
    """

    def __init__(self, function: Callable, calls: Sequence[tuple], counters: np.ndarray | None):
        self.function, self.counters = function, counters
        self.waiting = dict(enumerate(calls))  # who takes a member's arguments out runs it
        self.over = np.zeros(len(calls), np.int64)
        self.ends = [process.new_lock() for _ in calls]  # held until a member is over: the caller sleeps on them
        for end in self.ends:
            end.acquire()
        self.errors: list[BaseException] = []

    def run(self, member: int) -> None:
        """What a thread of the pool does."""
        try:
            arguments = self.waiting.pop(member, None)
            if arguments is not None:
                _deeper(self.function, *arguments)
        except BaseException as error:  # kernels raise none: there was no memory to call one; raised by the caller
            self.errors.append(error)
            self.open_barriers()
        finally:
            self.over[member] = 1
            self.ends[member].release()

    def open_barriers(self) -> None:
        """Nobody waits for a member that does not come."""
        if self.counters is not None:
            self.counters += OPEN

    def abandon(self) -> None:
        """No member starts any more; returns when those that run are over."""
        self.open_barriers()
        for member in range(len(self.over)):
            if self.waiting.pop(member, None) is not None:
                self.over[member] = 1
        _wait_for_all()(self.over.ctypes.data, len(self.over))


@functools.cache
def _wait_for_all() -> Callable[[int, int], None]:
    from .numba_sync import wait_for_all  # the compiler is not loaded before there is something to run

    return wait_for_all()


_workers: list[process.SimpleQueue] = []  # the calls of each thread
_lock = process.new_lock()  # held while a launch runs


@process.after_fork
def _forget() -> None:
    global _lock
    _workers.clear()
    _lock = process.new_lock()


def _serve(calls: process.SimpleQueue) -> None:
    while True:
        launch, member = calls.get()
        launch.run(member)
        del launch


def available(wanted: int) -> int:
    """How many threads a launch may use now: ``wanted``, or 1 while another launch runs."""
    if wanted <= 1 or _lock.locked() or sys.is_finalizing():  # then no other thread gets to run any more
        return 1
    try:
        while len(_workers) < wanted - 1:
            calls: process.SimpleQueue = process.SimpleQueue()
            process.start_thread(_serve, calls)
            _workers.append(calls)
    except RuntimeError:  # the system refuses more threads: use those there are
        return len(_workers) + 1
    return wanted


def run(function: Callable, calls: Sequence[tuple], counters: np.ndarray | None = None) -> None:
    """Calls ``function(*arguments)`` for all ``calls`` at once; no more calls than :func:`available` said.

    ``counters`` (int64): those of the barriers that the members wait at, where they do.

    From taking the pool until it is free again it is one call of C code, which runs no line of Python and so no signal
    handler: a launch has not begun, or it is over.  Only while the caller sleeps, its own member done, may a handler
    run and raise: then the others are waited for without one.
    """
    if len(calls) == 1:
        function(*calls[0])
        return
    launch, lock = _Launch(function, calls, counters), _lock
    own = partial(function, *launch.waiting.pop(0))
    launch.over[0] = 1  # when the wait begins
    hand_out = [partial(_workers[member - 1].put, (launch, member)) for member in launch.waiting]
    sleep = [launch.ends[member].acquire for member in range(1, len(calls))]
    begun: list[bool] = []
    parts = (lock.acquire, partial(begun.append, True), *hand_out, own, *sleep, begun.clear, lock.release)
    try:
        deque(map(_call, parts), maxlen=0)
    except BaseException:
        if begun:  # a signal's exception in the sleep, or there was no memory for a part
            launch.abandon()
            lock.release()
        raise
    if launch.errors:
        raise launch.errors[0]
