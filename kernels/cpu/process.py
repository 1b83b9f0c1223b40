"""What this process has of its own: native threads and locks, and what a fork left behind.

gevent and eventlet put greenlets in the place of what ``_thread``, ``threading`` and ``queue`` offer.  Greenlets take
turns on one thread: one that spins in a kernel until another has computed spins for ever.  So the kernels' threads, and
what these wait on, are the interpreter's own, whatever was patched over them.

A forked child has none of its parent's threads, and OpenMP's runtime does not know that: where torch shares out an
operation in a child of a process that has done so before, it waits for threads that are not there.
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
    """The module ``_thread`` as Python has it: another copy of it where this one was patched."""
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

    Raises RuntimeError where the system refuses, or where there are no native threads to be had.
    """
    if not isinstance(_start_new_thread, BuiltinFunctionType):
        raise RuntimeError("Python's threads are patched, and its own cannot be had")
    _start_new_thread(function, arguments)


_native_code = ctypes.CDLL("", handle=ctypes.pythonapi._handle)  # whose calls let other threads run Python
_new_gate = ctypes.CFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", _native_code))
_wait_at = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(("PyThread_acquire_lock", _native_code))
_open = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("PyThread_release_lock", _native_code))


class Gate:
    """What one thread sleeps at until another opens it; a signal does not wake it, so no handler runs there.

    A lock of Python's does not serve: who waits for one runs the handlers, which may raise, and a second signal then
    strikes whoever cleans up after the first.  This is the same kind of lock, waited for without that.

    ``wait`` and ``open``: once each by turns, whichever comes first; both are C code.  It is never freed: that would be
    a line of Python (``__del__``), in which an exception is lost.
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
_alone: set[object] = set()  # who is inside of one_torch_thread
_hidden = 0  # what torch.get_num_threads() said before the first of them


@after_fork
def _in_child() -> None:
    global _forked, _lock
    if _alone:
        torch.set_num_threads(_hidden)
        _alone.clear()
    _forked, _lock = True, RLock()


def torch_threads() -> int:
    """What the user has set with ``torch.set_num_threads``."""
    return _hidden if _alone else torch.get_num_threads()


def forked() -> bool:
    """Whether this is a forked child."""
    return _forked


def torch_would_hang() -> bool:
    """Whether operations that torch shares out among threads may wait for ever: in a forked child, with several."""
    return _forked and torch_threads() > 1


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    global _hidden
    one = object()
    try:  # first of all: an exception may strike at any line
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
    """Inside of the decorated function, torch's operations stay on the calling thread where they would hang else."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not _forked or not torch_would_hang():
            return function(*args, **kwargs)
        with _one_torch_thread():
            return function(*args, **kwargs)

    return guarded
