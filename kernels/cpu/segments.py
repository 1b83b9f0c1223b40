"""Backward by segments of steps: each segment's gates and cells are computed again, from the state that entered it.

Memory holds the states between segments, (B, P') and (B, H') for each, and the gates and cells of one segment: with
segments of about the square root of T, both grow with that root.  What a backward computes from them is the same,
in the same order, so the bits are too.

T time, B batch, N tokens: (step, row) pairs, D directions, K segments, H' and P' padded to whole vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..contract import Layer
from . import threads
from .prepared import Each, Jobs, Placed, Prepared, Stage
from .problem import Problem


class Segments:
    """Where the segments of each direction begin and end, in steps and in tokens.

    Their numbers follow the direction's order: direction 1 starts with the last steps.
    """

    def __init__(self, layer: Layer, starts: np.ndarray | None) -> None:
        steps, segment = layer.steps, layer.segment
        if starts is None:
            starts = np.arange(steps + 1, dtype=np.int64) * layer.batch
        self.first = np.arange(layer.segments, dtype=np.int64) * segment
        self.last = np.minimum(self.first + segment, steps)
        before = np.maximum(self.first - 1, 0)  # cells have the step before a segment too: its c enters
        # (D, K): the first token of the gates, of the cells, and the end
        tokens = [(starts[self.first], starts[before], starts[self.last])]
        if layer.directions == 2:
            begin = starts[steps - self.last]
            tokens.append((begin, begin, starts[steps - before]))
        self.gates, self.cells, end = (np.stack(each) for each in zip(*tokens, strict=True))
        self.room = int((end - self.cells).max())  # tokens of the largest


class _Patched:
    """A stage's structs in a call's array of arguments, set to one segment after another."""

    def __init__(self, stage: Placed, arguments: np.ndarray, segments: Segments, row_bytes: tuple[int, int]) -> None:
        self._launch, self._segments, self._row_bytes = stage.launch, segments, row_bytes
        self._counters, structs = arguments[stage.counters], arguments[stage.structs].reshape(-1, len(stage.names))
        self._first, self._last, self._gates, self._cells, self._direction = (
            structs[:, stage.names.index(name)] for name in ("first", "last", "gates", "cells", "reverse")
        )
        self._base = self._gates.copy(), self._cells.copy()

    def run(self, kernel: Any, here: int, number: int) -> None:
        """The steps of one segment; addresses are moved so that its first token lies where its memory begins."""
        segments, direction = self._segments, self._direction
        self._first[:], self._last[:] = segments.first[number], segments.last[number]
        self._gates[:] = self._base[0] - segments.gates[direction, number] * self._row_bytes[0]
        self._cells[:] = self._base[1] - segments.cells[direction, number] * self._row_bytes[1]
        self._counters[:] = 0
        threads.run(kernel, self._launch.at(here), self._counters)


class Segmented(Prepared):
    """A forward and a backward stage by turns, from the last segment to the first.

    The buffers called gates and cells have ``segments.room`` tokens; ``each`` is called after each segment.
    """

    def __init__(self, problem: Problem, before: Jobs, stages: Sequence[Stage], after: Jobs) -> None:
        super().__init__(problem, before, stages, after)
        self.segments = Segments(problem.layer, problem.starts)

    def _run_stages(self, kernels: Sequence[Any], arguments: np.ndarray, here: int, each: Each | None) -> None:
        p = self.problem
        row_bytes = p.padded_gates * p.stored, p.padded_hidden * p.size
        patched = [_Patched(stage, arguments, self.segments, row_bytes) for stage in self._stages]
        for number in range(len(self.segments.first) - 1, -1, -1):
            for kernel, stage in zip(kernels, patched, strict=True):
                stage.run(kernel, here, number)
            if each is not None:
                each(number)
