"""Launches on the threads that torch already has: the members of its OpenMP team.

torch's threads spin for milliseconds after every operation of torch's, waiting for the next one, on the same cores that
threads of our own would need.  After a Linear, on an AMD EPYC with AVX2 and 2 cores, T = 200, B = 32, H = 64 took 7.9
ms on a pool and 4.0 as members of the team, training 14.8 and 9.6.  The spinning threads take work at once if it
reaches them through the runtime that they belong to.  libtorch_cpu depends on that runtime, so a handle of it finds the
entry point by which compilers start a parallel region, ``GOMP_parallel``; GNU's runtime has it, and LLVM's and Intel's
export it too.  Systems with none of them (macOS, Windows) use the pool of ``threads.py``.

A launch asks for as many threads as torch does: the runtime ends the surplus threads of a smaller team, and torch's
next operation would have to start them again.  Threads without a member return at once.  A team may be smaller than
requested (OMP_THREAD_LIMIT, OMP_DYNAMIC, a nested region): every thread checks the team's size before it begins, so
that no member waits for one that never starts, and the host learns that nothing has been computed.

Every Python thread is the master of a team of its own, whose threads the runtime starts on first use, as for torch's
own operations; if the system refuses them, the runtime ends the process, as it does for torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from . import process
from .arguments import Head
from .buffers import address_of


class Entry(NamedTuple):
    """The functions of the OpenMP runtime."""

    parallel: Callable[[int, int, int, int], None]  # (function, its argument, threads, flags)
    in_parallel: Callable[[], int]  # whether the caller is a member of a team
    cores: Callable[[], int]  # that the process may use
    thread_num: int  # addresses
    num_threads: int


@functools.cache
def _load() -> Entry | str:
    """The runtime's functions, or one sentence on why there are none."""
    if sys.platform != "linux":
        return "torch's threads are reached on Linux only"
    where = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:  # a runtime that was loaded before torch's comes first: torch's calls go to it
        libraries = (ctypes.CDLL(None), ctypes.CDLL(where))
    except OSError as error:
        return f"torch's library cannot be opened: {error}"
    for library in libraries:
        try:
            parallel = library.GOMP_parallel
            asked = library.omp_in_parallel, library.omp_get_num_procs
            numbers = library.omp_get_thread_num, library.omp_get_num_threads
        except AttributeError:
            continue
        parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        at_once = ctypes.PYFUNCTYPE(ctypes.c_int)  # keeps the GIL: releasing it can cost milliseconds
        in_parallel, cores = (at_once(_address(each)) for each in asked)
        thread_num, num_threads = map(_address, numbers)
        return Entry(parallel, in_parallel, cores, thread_num, num_threads)
    return "this build of torch has no OpenMP runtime with GOMP_parallel"


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def cores() -> int | None:
    """How many cores the process may use, as the runtime reports; None without a runtime."""
    entry = _load()
    return None if isinstance(entry, str) else entry.cores()


_too_small: str | None = None  # the sentence, once a team was smaller than requested


def missing() -> str | None:
    """None if this thread can launch on torch's team; else one sentence on why not."""
    entry = _load()
    if isinstance(entry, str):
        return entry
    if process.forked():
        return "a forked child has none of torch's threads"
    if entry.in_parallel():
        return "the caller is a thread of a team itself"
    return _too_small


@functools.cache
def _member() -> int:
    """The address of the function that every thread of the team runs, on the address of a ``Head``."""
    from .member import member_kernel  # loads the compiler, so only when there is something to run

    return member_kernel().address


def prewarm() -> None:
    """Compiles, or loads from the disk cache, what a launch on the team needs."""
    if not isinstance(_load(), str):
        _member()


class Launch:
    """A launch of the kernel at ``function``, with an argument struct per member; ``run`` is one call of C code."""

    def __init__(self, function: int, arguments: int, members: int, stride: int) -> None:
        entry = _load()
        assert isinstance(entry, Entry)
        head = Head(function, arguments, stride, members, entry.thread_num, entry.num_threads, 0)
        self._head, self._members = np.array(head, np.int64), members
        self.asked = process.torch_threads()
        self.run = partial(entry.parallel, _member(), address_of(self._head), self.asked, 0)

    def done(self) -> bool:
        """Whether the members have run; otherwise the team was too small and is not used again."""
        global _too_small
        size = int(self._head[-1])
        if size >= self._members:
            return True
        _too_small = f"its team had {size} threads where {self.asked} were asked for"
        return False
