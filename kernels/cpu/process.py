"""Native threads and locks of this process, and what changes in a forked child.

gevent and eventlet replace what ``_thread``, ``threading`` and ``queue`` offer by greenlets.  Greenlets share one
thread: one that spins in a kernel until another has computed never ends.  So the kernels' threads, and their locks and
queues, are the interpreter's own, whether or not these modules were patched.

A forked child has none of its parent's threads, and OpenMP's runtime does not know that: if torch runs a parallel
operation in a child of a process that has done so before, it waits for threads that do not exist.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import importlib.util
import os
from _queue import SimpleQueue  # the one that ``queue`` offers until it is patched
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import BuiltinImporter
from types import BuiltinFunctionType
from typing import Any

import torch

__all__ = [
    "Gate",
    "RLock",
    "SimpleQueue",
    "after_fork",
    "forked",
    "new_lock",
    "one_torch_thread",
    "start_thread",
    "torch_threads",
    "torch_would_hang",
]


def _native_threads() -> Any:
    """Python's own module ``_thread``: a second copy of it if the first was patched."""
    if isinstance(_thread.start_new_thread, BuiltinFunctionType):
        return _thread
    spec = BuiltinImporter.find_spec("_thread")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    BuiltinImporter.exec_module(module)
    return module


_native = _native_threads()
_start_new_thread = _native.start_new_thread
new_lock, RLock = _native.allocate_lock, _native.RLock


def start_thread(function: Callable[..., None], *arguments: Any) -> None:
    """Runs ``function`` on a new native thread, which does not keep the process from ending.

    Raises RuntimeError if the system refuses, or if native threads cannot be reached.
    """
    if not isinstance(_start_new_thread, BuiltinFunctionType):
        raise RuntimeError("Python's threads are patched, and its own cannot be had")
    _start_new_thread(function, arguments)


_native_code = ctypes.CDLL("", handle=ctypes.pythonapi._handle)  # calls through it release the GIL
_new_gate = ctypes.CFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", _native_code))
_wait_at = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(("PyThread_acquire_lock", _native_code))
_open = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("PyThread_release_lock", _native_code))


class Gate:
    """A binary semaphore: one thread waits until another opens it; a signal does not wake it, so no handler runs.

    Python's locks cannot be used: a thread that waits for one runs signal handlers, which may raise; a second signal
    can then interrupt the cleanup after the first.  This is the same kind of lock, waited for without running handlers.

    ``wait`` and ``open`` alternate, whichever is called first; both are C code.  The lock is never freed: that would
    take a line of Python (``__del__``), in which an exception is lost.
    """

    __slots__ = ("open", "wait")

    def __init__(self) -> None:
        lock = _new_gate()
        if not lock:
            raise MemoryError("no memory for a lock")
        self.wait = functools.partial(_wait_at, lock, 1)
        self.open = functools.partial(_open, lock)
        self.wait()  # closed


def after_fork(function: Callable[[], None]) -> Callable[[], None]:
    """Calls the decorated function in every forked child, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


_forked = False
_lock = RLock()
_alone: set[object] = set()  # the calls inside one_torch_thread
_hidden = 0  # what torch.get_num_threads() said before the first of them


@after_fork
def _in_child() -> None:
    global _forked, _lock
    if _alone:
        torch.set_num_threads(_hidden)
        _alone.clear()
    _forked, _lock = True, RLock()


def torch_threads() -> int:
    """The number of threads that the user has set with ``torch.set_num_threads``."""
    return _hidden if _alone else torch.get_num_threads()


def forked() -> bool:
    """Whether this is a forked child."""
    return _forked


def torch_would_hang() -> bool:
    """Whether parallel operations of torch's may never return: in a forked child, with several threads."""
    return _forked and torch_threads() > 1


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    global _hidden
    one = object()
    try:  # first of all: an exception may be raised at any line
        with _lock:
            if not _alone:
                _hidden = torch.get_num_threads()
            _alone.add(one)
            torch.set_num_threads(1)
        yield
    finally:
        with _lock:
            if one in _alone:
                _alone.remove(one)
                if not _alone:
                    torch.set_num_threads(_hidden)


def one_torch_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """In the decorated function torch's operations stay on the calling thread if they would hang otherwise."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not _forked or not torch_would_hang():
            return function(*args, **kwargs)
        with _one_torch_thread():
            return function(*args, **kwargs)

    return guarded
