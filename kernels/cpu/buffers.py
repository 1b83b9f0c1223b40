"""Memory that is used again: the saved gates of training, and scratch.

Fresh pages cost more than the arithmetic that fills them (the kernel zeroes each before it hands it out), and a
training step asks for the same large buffers every time.  ``take`` gives a tensor whose memory is free again when the
last reference to it dies, by whatever path.  No caller has to give anything back, and no code runs then that a signal's
exception could strike: a block is lent for as long as somebody holds the view of it that was lent.  All blocks
together, lent and free, are at most ``LIMIT`` bytes; what goes beyond is memory like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import process

LIMIT = 512 << 20  # bytes
SMALL = 128 << 10  # bytes: less is left to malloc, which does not ask the system for each
ALIGN = 64  # a cache line, and a vector register of AVX-512
SLACK = 64 << 10  # a free block may be larger than what is asked for by this and an eighth


class _Block:
    """Memory, where it is, and the view of it that was lent last."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.address = memory, memory.ctypes.data
        self.lent: Callable[[], np.ndarray | None] = lambda: None  # a weak reference

    def fits(self, size: int) -> bool:
        return size <= self.memory.nbytes <= size + size // 8 + SLACK and self.lent() is None


_blocks: list[_Block] = []  # those lent last come last
_lock = process.RLock()


@process.after_fork
def _forget() -> None:
    global _lock
    _lock = process.RLock()


def take(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised, aligned, one-dimensional tensor of ``count`` values.

    Raises RuntimeError, in torch's words, where there is no memory left.
    """
    size = max(count * dtype.itemsize, ALIGN)
    if _lends(size):
        return torch.from_numpy(_lend(size)[0]).view(dtype)[:count]
    if size < SMALL:
        return torch.empty(count, dtype=dtype, device="cpu")  # torch's are aligned as well
    return torch.from_numpy(_allocate(size)).view(dtype)[:count]


def _lends(size: int) -> bool:
    """Whether ``size`` bytes come from a block (a garbage collection inside of ``_lend`` may run code that takes)."""
    return size >= SMALL and not _lock._is_owned()


def _lend(size: int) -> tuple[np.ndarray, int]:
    """``size`` bytes of a block that nobody uses, and their address."""
    with _lock:
        fitting = [block for block in _blocks if block.fits(size)]
        block = min(fitting, key=lambda each: each.memory.nbytes, default=None)
        if block is None:
            block = _Block(_allocate(size))
            _make_room(size)
        else:
            _blocks.remove(block)
        lent = block.memory[:size]
        block.lent = weakref.ref(lent)
        if sum(each.memory.nbytes for each in _blocks) + block.memory.nbytes <= LIMIT:
            _blocks.append(block)
    return lent, block.address


def _make_room(size: int) -> None:
    """Lets free blocks go, the oldest first, until a new one of ``size`` bytes is within the limit."""
    excess = sum(block.memory.nbytes for block in _blocks) + size - LIMIT
    for block in list(_blocks):
        if excess > 0 and block.lent() is None:
            _blocks.remove(block)
            excess -= block.memory.nbytes


def _allocate(size: int) -> np.ndarray:
    try:
        raw = np.empty(size + ALIGN, np.uint8)
    except MemoryError:
        clear()
        raw = torch.empty(size + ALIGN, dtype=torch.uint8, device="cpu").numpy()  # raises what torch raises
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size]


def clear() -> None:
    """Gives all unused memory back to the system."""
    with _lock:
        _blocks[:] = [block for block in _blocks if block.lent() is not None]


def room(size: int) -> tuple[object, int]:
    """``size`` bytes for scratch: what owns them, and their aligned address."""
    if _lends(size):
        return _lend(size)
    memory = _allocate(max(size, ALIGN))
    return memory, memory.ctypes.data
