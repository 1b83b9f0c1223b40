"""The threads of a launch of a kernel.

A launch is a list of argument structs, one per member: all members run at once, the first on the caller's own thread,
because they wait for one another inside the kernel (``sync.py``).  They are threads of torch's own team if there is one
(``team.py``), else of a pool kept here, whose native threads sleep on a queue between launches.  Numba's parallel
layers cannot be used: its workqueue aborts the process when two threads enter it, its OpenMP layer crashes in a forked
child, and it loads a second OpenMP runtime in addition to torch's.

One launch at a time; if another one is running, :func:`available` returns 1 and the caller runs on its own thread,
which also uses the cores better.  A forked child has none of its parent's threads: it starts with an empty pool.

An exception may be raised between any two lines of Python: signal handlers run there (Ctrl-C).  So what must not be
interrupted is one call of C code (see :func:`run`), and nothing has to be released by a line that may not be reached.
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

OPEN = 1 << 40  # added to a barrier's counter, it releases all threads; no launch has that many barriers

_call = methodcaller("__call__")


def count() -> int:
    """Threads that a launch may use: torch's setting, but no more than there are cores."""
    return min(process.torch_threads(), _cores())


def _cores() -> int:
    """How many cores this process may use; asks OpenMP's runtime, which may have pinned this thread to one core."""
    cores = team.cores()
    if cores is not None:
        return cores
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deeper(function: Callable, arguments: int) -> None:
    """Calls ``function``, from one frame of the interpreter further down the stack of a thread of the pool.

    Called directly, one member of two took 1.6 times as long as the other (T = 500, B = 32, H = 128, alone, on an AMD
    EPYC with AVX2: 75 to 84 ms; this way 44 to 52).  The likely cause, not proven: such a stack begins at the start of
    a page, and if the kernels' own variables in it are a multiple of 4096 bytes away from the rows that they load, the
    processor takes loads for dependent on stores that are not.
    """
    function(arguments)


class _Worker:
    """A thread of the pool: its inbox of (launch, member), and the gate at which the caller waits for each."""

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
    """A launch on the pool: the first member runs on the caller's thread, each other on a worker's.

    ``counters``: those of its members' barriers.
    """

    def __init__(self, function: Callable, addresses: Sequence[int], counters: np.ndarray | None):
        self.function, self.counters = function, counters
        self.waiting = dict(enumerate(addresses))  # the thread that takes a member's arguments out runs it
        self.workers = dict(enumerate(_workers[: len(addresses) - 1], 1))
        self.waited: list[int] = []  # members whose gates the caller has passed
        self.errors: list[BaseException] = []

    def run(self, member: int) -> None:
        """Runs a member on a thread of the pool, unless it was abandoned, and opens the thread's gate."""
        arguments = self.waiting.pop(member, None)
        if arguments is None:
            return
        try:
            _deeper(self.function, arguments)
        except BaseException as error:  # kernels raise nothing: no memory for the call; the caller raises it
            self.errors.append(error)
            self.open_barriers()
        finally:
            self.workers[member].gate.open()

    def open_barriers(self) -> None:
        """Releases the barriers, so that no thread waits for a member that never started."""
        if self.counters is not None:
            self.counters += OPEN

    def abandon(self) -> None:
        """Lets no further member start; returns when those that run have finished."""
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
    if wanted <= 1 or _lock.locked() or sys.is_finalizing():  # in which no other thread runs any more
        return 1
    return min(wanted, process.torch_threads()) if _no_team() is None else _start_workers(wanted)


def _no_team() -> str | None:
    """None if a launch runs on torch's team; else one sentence on why not."""
    # With 8 threads of torch's on 2 cores (AMD EPYC) team and pool are equally fast, but next to another process
    # training took 1.2 times as long on the team.
    if process.torch_threads() > _cores():
        return "torch has more threads than there are cores"
    return team.missing()


def _start_workers(wanted: int) -> int:
    """Starts workers; returns how many threads of those ``wanted`` the pool and the caller have."""
    try:
        while len(_workers) < wanted - 1:
            _workers.append(_Worker())
    except (RuntimeError, MemoryError):  # the system refuses more threads: use what there is
        return len(_workers) + 1
    return wanted


def describe() -> str:
    """Whose threads a launch uses, as text for users."""
    why = _no_team()
    return "torch's own" if why is None else f"of a pool: {why}"


def prewarm() -> None:
    """Compiles, or loads from the disk cache, what launches need in addition to their kernels."""
    team.prewarm()


class Launch(NamedTuple):
    """The place of a launch's argument structs, one per member."""

    address: int
    members: int
    stride: int  # bytes

    def at(self, address: int) -> Launch:
        """The launch with its structs moved by ``address`` bytes."""
        return Launch(address + self.address, self.members, self.stride)

    def addresses(self) -> range:
        return range(self.address, self.address + self.members * self.stride, self.stride)


def run(kernel: Any, launch: Launch, counters: np.ndarray | None = None) -> None:
    """Runs ``kernel`` on all members at once; they may not be more than :func:`available` said.

    ``counters`` (int64): those of the members' barriers, if they have any.

    Taking the lock, running and releasing the lock are one call of C code, which runs no line of Python and so no
    signal handler: at any line of Python a launch either has not begun or has finished.

    Raises RuntimeError if the system refuses the threads.
    """
    if launch.members == 1:
        kernel(launch.address)
    else:
        Repeated(kernel, launch, counters).run()


class Repeated:
    """A launch on several threads that may run many times (see :func:`run`): prepared for torch's team once."""

    def __init__(self, kernel: Any, launch: Launch, counters: np.ndarray | None) -> None:
        self._kernel, self._launch, self._counters = kernel, launch, counters
        self._on_team: team.Launch | None = None

    def run(self) -> None:
        """Runs all members at once, once."""
        if _no_team() is None:
            if self._on_team is None or self._on_team.asked != process.torch_threads():
                self._on_team = team.Launch(self._kernel.address, *self._launch)
            _in_one(self._on_team.run, abandon=_nothing)
            if self._on_team.done():
                return
        members = self._launch.members
        if _start_workers(members) < members:
            raise RuntimeError("the system refuses the threads of a launch: torch.set_num_threads(1) does without")
        _run_on_pool(self._kernel, self._launch.addresses(), self._counters)


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
    """Runs ``calls``, which are C code, under the lock and without interruption; ``abandon`` if one of them fails."""
    lock = _lock
    begun: list[bool] = []
    try:
        deque(map(_call, (lock.acquire, partial(begun.append, True), *calls, begun.clear, lock.release)), maxlen=0)
    except BaseException:
        if begun:  # there was no memory for a call
            abandon()
            lock.release()
        raise
