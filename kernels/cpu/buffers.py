"""Memory that is reused: the saved gates of training, and scratch.

Fresh pages cost more than the arithmetic that fills them (the operating system zeroes each of them), and a training
step asks for the same large buffers every time.  ``take`` returns a tensor whose memory becomes reusable when the last
reference to it is gone, however that happens.  No caller has to give anything back, and no code runs then that a
signal's exception could interrupt: a buffer is in use as long as the view of it that was lent exists.  All buffers
together, in use and free, have at most ``LIMIT`` bytes; larger demands are ordinary allocations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import process

LIMIT = 512 << 20  # bytes
SMALL = 128 << 10  # bytes: smaller requests are left to malloc, which serves them without a system call
ALIGN = 64  # a cache line, and a vector register of AVX-512
SLACK = 64 << 10  # bytes; a free buffer may exceed a request by this and an eighth of the request


class _Buffer:
    """Memory, its address, and the view of it that was lent last."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.address = memory, memory.ctypes.data
        self.lent: Callable[[], np.ndarray | None] = lambda: None  # a weak reference

    def fits(self, size: int) -> bool:
        return size <= self.memory.nbytes <= size + size // 8 + SLACK and self.lent() is None


_buffers: list[_Buffer] = []  # the one lent last comes last
_lock = process.RLock()


@process.after_fork
def _forget() -> None:
    global _lock
    _lock = process.RLock()


def take(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised, aligned, one-dimensional tensor of ``count`` values.

    Raises torch's RuntimeError if there is no memory left.
    """
    size = max(count * dtype.itemsize, ALIGN)
    if _lends(size):
        return torch.from_numpy(_lend(size)[0]).view(dtype)[:count]
    if size < SMALL:
        return torch.empty(count, dtype=dtype, device="cpu")  # torch's are aligned as well
    return torch.from_numpy(_allocate(size)).view(dtype)[:count]


def address_of(array: np.ndarray) -> int:
    """The address of ``array``, in half the time of ``array.ctypes.data``."""
    return array.__array_interface__["data"][0]


def _lends(size: int) -> bool:
    """Whether ``size`` bytes come from a buffer (a garbage collection inside ``_lend`` may run code that takes)."""
    return size >= SMALL and not _lock._is_owned()


def _lend(size: int) -> tuple[np.ndarray, int]:
    """``size`` bytes of a buffer that is not in use, and their address."""
    with _lock:
        fitting = [buffer for buffer in _buffers if buffer.fits(size)]
        buffer = min(fitting, key=lambda each: each.memory.nbytes, default=None)
        if buffer is None:
            buffer = _Buffer(_allocate(size))
            _make_room(size)
        else:
            _buffers.remove(buffer)
        lent = buffer.memory[:size]
        buffer.lent = weakref.ref(lent)
        if sum(each.memory.nbytes for each in _buffers) + buffer.memory.nbytes <= LIMIT:
            _buffers.append(buffer)
    return lent, buffer.address


def _make_room(size: int) -> None:
    """Drops free buffers, the oldest first, until a new one of ``size`` bytes is within the limit."""
    excess = sum(buffer.memory.nbytes for buffer in _buffers) + size - LIMIT
    for buffer in list(_buffers):
        if excess > 0 and buffer.lent() is None:
            _buffers.remove(buffer)
            excess -= buffer.memory.nbytes


def _allocate(size: int) -> np.ndarray:
    try:
        raw = np.empty(size + ALIGN, np.uint8)
    except MemoryError:
        clear()
        raw = torch.empty(size + ALIGN, dtype=torch.uint8, device="cpu").numpy()  # raises what torch raises
    start = -address_of(raw) % ALIGN
    return raw[start : start + size]


def clear() -> None:
    """Gives all unused memory back to the system."""
    with _lock:
        _buffers[:] = [buffer for buffer in _buffers if buffer.lent() is not None]


def scratch(size: int) -> tuple[object, int]:
    """``size`` bytes of scratch: their owner, to be kept, and their aligned address."""
    if _lends(size):
        return _lend(size)
    memory = _allocate(max(size, ALIGN))
    return memory, address_of(memory)
