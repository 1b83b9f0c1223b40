"""The thread pool that runs the kernels.

Numba's own parallel layers do not serve: its workqueue aborts the process when two threads enter it, its OpenMP layer
dies in a forked child, and it loads a second OpenMP runtime beside torch's.  Here a launch is a list of calls of a
``nogil`` kernel, one a thread, the first on the caller's own; the others run on daemon threads that sleep on a queue
between launches.

Members of a launch wait for one another inside the kernel (``numba_sync.py``), so all of them have to run at once.  One
launch owns the whole pool; a caller that finds it taken is told so by :func:`reserve` and runs alone, which is also the
better use of the cores.  A forked child has none of its parent's threads: it starts with an empty pool.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch


def count() -> int:
    """Threads that a launch may use: torch's setting, but no more than there are cores to run them at once."""
    return min(torch.get_num_threads(), _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A daemon thread that runs one call at a time."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="lstmcore", daemon=True).start()

    def _serve(self) -> None:
        while True:
            launch, member = self.calls.get()
            launch.call(member)
            launch.finished.put(member)


class _Launch:
    """One call a member.  ``started[m]`` is set by the kernel itself, as its first act."""

    def __init__(self, function: Callable, calls: Sequence[tuple], started: np.ndarray):
        self.function, self.calls, self.started = function, calls, started
        self.finished: queue.SimpleQueue = queue.SimpleQueue()
        self.errors: list[BaseException] = []

    def call(self, member: int) -> None:
        if not self.started[member]:
            try:
                self.function(*self.calls[member])
            except Exception as error:  # handed to the caller, who raises it
                self.errors.append(error)


_workers: list[_Worker] = []
_taken = threading.Lock()


def _forget() -> None:
    global _taken
    _workers.clear()
    _taken = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def reserve(wanted: int) -> Iterator[int]:
    """The number of threads that a launch may use now: ``wanted``, or 1 while another launch runs."""
    if wanted <= 1 or not _taken.acquire(blocking=False):
        yield 1
        return
    lock = _taken
    try:
        try:
            while len(_workers) < wanted - 1:
                _workers.append(_Worker())
        except RuntimeError:  # the system refuses more threads: use those there are
            wanted = len(_workers) + 1
        yield wanted
    finally:
        lock.release()


def run(function: Callable, calls: Sequence[tuple], started: np.ndarray) -> None:
    """Calls ``function(*arguments)`` for all ``calls`` at once; under :func:`reserve`, with no more calls than it gave.

    ``started``: zeros, one an entry of ``calls``; the kernel of member m sets entry m before anything else.  With it an
    exception from a signal handler (Ctrl-C), which may strike between any two of these lines, neither leaves a member
    waiting for one that never comes nor lets memory go that a member still writes to: it is raised when all are done.
    """
    if len(calls) == 1:
        function(*calls[0])
        return
    launch = _Launch(function, calls, started)
    waiting = set(range(1, len(calls)))
    interruption: BaseException | None = None
    while waiting or not started[0]:
        try:
            for member in sorted(waiting):  # twice is harmless: a worker skips what it has started
                if not started[member]:
                    _workers[member - 1].calls.put((launch, member))
            launch.call(0)
            while waiting:
                waiting.discard(launch.finished.get())
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption
    if launch.errors:
        raise launch.errors[0]
