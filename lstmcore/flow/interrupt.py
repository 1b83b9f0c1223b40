"""Ctrl-C in a training that wants to end between two steps."""

from __future__ import annotations

import signal
from types import FrameType


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
