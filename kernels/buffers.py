"""Memory that is used again: the saved gates of training, and scratch.

Fresh pages cost more than the arithmetic that fills them (the kernel zeroes each before it hands it out), and a
training step asks for the same large buffers every time.  ``take`` gives a tensor whose memory comes back here when
the last reference to it dies, by whatever path: no caller has to give anything back.  At most ``LIMIT`` bytes lie
unused.
"""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

LIMIT = 512 << 20  # bytes
ALIGN = 64  # a cache line, and a vector register of AVX-512
SLACK = 64 << 10  # a free block may be larger than what is asked for by this and an eighth

_free: list[np.ndarray] = []
_lock = threading.RLock()  # re-entrant: a collection inside `take` may run a finalizer that gives back


def _forget() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def take(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised, aligned, one-dimensional tensor of ``count`` values."""
    size = max(count * dtype.itemsize, ALIGN)
    with _lock:
        fitting = [block for block in _free if size <= block.nbytes <= size + size // 8 + SLACK]
        memory = min(fitting, key=lambda block: block.nbytes, default=None)
        if memory is not None:
            _free[:] = [block for block in _free if block is not memory]
    if memory is None:
        raw = np.empty(size + ALIGN, np.uint8)
        start = -raw.ctypes.data % ALIGN
        memory = raw[start : start + size]
    lease = memory[:size]
    weakref.finalize(lease, _give_back, memory).atexit = False
    return torch.from_numpy(lease).view(dtype)[:count]


def _give_back(memory: np.ndarray) -> None:
    with _lock:
        _free.append(memory)
        while sum(block.nbytes for block in _free) > LIMIT:
            _free.pop(0)


def clear() -> None:
    """Gives all unused memory back to the system."""
    with _lock:
        _free.clear()


def carve(*sizes: int) -> tuple[Tensor, list[int]]:
    """One buffer for several uses: (its owner, the aligned address of each); 0 for a size of 0 bytes."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // ALIGN) * ALIGN
    owner = take(total, torch.uint8)
    base = owner.data_ptr()
    return owner, [base + offset if size else 0 for offset, size in zip(offsets, sizes, strict=True)]
