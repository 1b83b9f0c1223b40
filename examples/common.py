"""What the examples share: sizes as arguments, Ctrl-C between two steps, and the arithmetic of small models."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


class Interrupt:
    """Turns the first Ctrl-C into a wish to stop, granted between two steps; the second one acts as always."""

    def __init__(self) -> None:
        self.wanted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, self._before)

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


@contextmanager
def fast_arithmetic() -> Iterator[None]:
    """One thread, without denormal numbers: a vanishing gradient meets them, and a CPU is many times slower with them.

    torch leaves them out in the calling thread only; and a second one gains nothing where products are this small.
    """
    threads = torch.get_num_threads()
    flushed = not torch.tensor(torch.finfo(torch.float32).tiny).mul(0.5).item()  # torch has no other way to ask
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(threads)
