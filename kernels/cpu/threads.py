"""How a launch of a kernel gets its threads.

A launch is a list of records, one a member: all members run at once, the first on the caller's own thread, because they
wait for one another inside the kernel (``sync.py``).  They are threads of torch's own team where there is one
(``team.py``), else of a pool kept here, whose native threads sleep on a queue between launches.  Numba's parallel
layers do not serve: its workqueue aborts the process when two threads enter it, its OpenMP layer dies in a forked
child, and it loads a second OpenMP runtime beside torch's.

One launch at a time; a caller that finds another running is told so by :func:`available` and runs alone, which is also
the better use of the cores.  A forked child has none of its parent's threads: it starts with an empty pool.

An exception may strike between any two lines of Python: signal handlers run there (Ctrl-C), and raise.  So all that
must not be torn apart is one call of C code (see :func:`run`), and nothing has to be given back by a line that may not
come.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np

from . import process, team

OPEN = 1 << 40  # added to a barrier's counter it lets everybody through; no launch has so many turns

_call = methodcaller("__call__")


def count() -> int:
    """Threads that a launch may use: torch's setting, but no more than there are cores to run them at once."""
    return min(process.torch_threads(), _cores())


def _cores() -> int:
    """How many cores this process may use, as OpenMP's runtime knows it: it may have pinned this thread to one."""
    cores = team.cores()
    if cores is not None:
        return cores
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deeper(function: Callable, arguments: int) -> None:
    """Calls ``function``, from one frame of the interpreter further down the stack of a thread of the pool.

    Called directly, one member of two took 1.6 times as long as the other (T = 500, B = 32, H = 128, alone, on an AMD
    EPYC with AVX2: 75 to 84 ms; so 44 to 52).  The likely cause, not proven: such a stack begins at the start of a
    page, and where the kernels' own variables lie in it as the rows that they load do, but for a multiple of 4096
    bytes, the processor takes loads for dependent on stores that are not.
    """
    function(arguments)


class _Worker:
    """A thread of the pool: the launches and members handed to it, and what the caller sleeps at until each is over."""

    __slots__ = ("gate", "inbox")

    def __init__(self) -> None:
        self.inbox: process.SimpleQueue = process.SimpleQueue()
        self.gate = process.Gate()
        process.start_thread(self._serve)

    def _serve(self) -> None:
        while True:
            launch, member = self.inbox.get()
            launch.run(member)
            del launch


class _Launch:
    """A launch on the pool: the first member is the caller's own, each other a worker's.

    ``counters``: those of the barriers that its members wait at.
    """

    def __init__(self, function: Callable, addresses: Sequence[int], counters: np.ndarray | None):
        self.function, self.counters = function, counters
        self.waiting = dict(enumerate(addresses))  # who takes a member's record out runs it
        self.workers = dict(enumerate(_workers[: len(addresses) - 1], 1))
        self.waited: list[int] = []  # members whose gates the caller has passed
        self.errors: list[BaseException] = []

    def run(self, member: int) -> None:
        """What a thread of the pool does; it opens its gate if the member was still to be run."""
        arguments = self.waiting.pop(member, None)
        if arguments is None:
            return
        try:
            _deeper(self.function, arguments)
        except BaseException as error:  # kernels raise none: there was no memory to call one; raised by the caller
            self.errors.append(error)
            self.open_barriers()
        finally:
            self.workers[member].gate.open()

    def open_barriers(self) -> None:
        """Nobody waits for a member that does not come."""
        if self.counters is not None:
            self.counters += OPEN

    def abandon(self) -> None:
        """No member starts any more; returns when those that run are over."""
        self.open_barriers()
        for member, worker in self.workers.items():
            if self.waiting.pop(member, None) is None and member not in self.waited:
                worker.gate.wait()


_workers: list[_Worker] = []
_lock = process.new_lock()  # held while a launch runs


@process.after_fork
def _forget() -> None:
    global _lock
    _workers.clear()
    _lock = process.new_lock()


def available(wanted: int) -> int:
    """How many threads a launch may use now: ``wanted``, or 1 while another launch runs."""
    if wanted <= 1 or _lock.locked() or sys.is_finalizing():  # then no other thread gets to run any more
        return 1
    return min(wanted, process.torch_threads()) if _no_team() is None else _start_workers(wanted)


def _no_team() -> str | None:
    """None where a launch runs on torch's team; else one sentence on why not."""
    # With 8 threads of torch's on 2 cores (AMD EPYC) team and pool are level, but beside another process training took
    # 1.2 times as long on the team.
    if process.torch_threads() > _cores():
        return "torch has more threads than there are cores"
    return team.missing()


def _start_workers(wanted: int) -> int:
    """How many threads, of ``wanted``, the pool and the caller are."""
    try:
        while len(_workers) < wanted - 1:
            _workers.append(_Worker())
    except (RuntimeError, MemoryError):  # the system refuses more threads: use those there are
        return len(_workers) + 1
    return wanted


def describe() -> str:
    """Whose threads a launch uses, for people to read."""
    why = _no_team()
    return "torch's own" if why is None else f"of a pool: {why}"


def prewarm() -> None:
    """Compiles, or loads from the disk cache, what launches need beside their kernels."""
    team.prewarm()


class Launch(NamedTuple):
    """Where the records of a launch lie, one a member."""

    address: int
    members: int
    stride: int  # bytes

    def at(self, address: int) -> Launch:
        """This one, its records at as many bytes from ``address`` as they are here from 0."""
        return Launch(address + self.address, self.members, self.stride)

    def addresses(self) -> range:
        return range(self.address, self.address + self.members * self.stride, self.stride)


def run(kernel: Any, launch: Launch, counters: np.ndarray | None = None) -> None:
    """Runs ``kernel`` on all records at once; no more of them than :func:`available` said.

    ``counters`` (int64): those of the barriers that the members wait at, where they do.

    From taking the lock until it is free again it is one call of C code, which runs no line of Python and so no signal
    handler: a launch has not begun, or it is over.
    """
    if launch.members == 1:
        kernel(launch.address)
        return
    if _no_team() is None:
        on_team = team.Launch(kernel.address, *launch)
        _in_one(on_team.run, abandon=_nothing)
        if on_team.done():
            return
    if _start_workers(launch.members) < launch.members:
        raise RuntimeError("the system refuses the threads of a launch: torch.set_num_threads(1) does without")
    _run_on_pool(kernel, launch.addresses(), counters)


def _run_on_pool(function: Callable, addresses: Sequence[int], counters: np.ndarray | None) -> None:
    launch = _Launch(function, addresses, counters)
    own = partial(function, launch.waiting.pop(0))
    hand_out = [partial(worker.inbox.put, (launch, member)) for member, worker in launch.workers.items()]
    waits = [
        call
        for member, worker in launch.workers.items()
        for call in (worker.gate.wait, partial(launch.waited.append, member))
    ]
    _in_one(*hand_out, own, *waits, abandon=launch.abandon)
    if launch.errors:
        raise launch.errors[0]


def _nothing() -> None:
    pass


def _in_one(*calls: Callable, abandon: Callable[[], object]) -> None:
    """Calls ``parts``, which are C code, while nobody else does; ``abandon`` where one of them fails."""
    lock, begun = _lock, list[bool]()
    try:
        deque(map(_call, (lock.acquire, partial(begun.append, True), *calls, begun.clear, lock.release)), maxlen=0)
    except BaseException:
        if begun:  # there was no memory for a part
            abandon()
            lock.release()
        raise
