"""A call's arguments in memory, and the launches that they are for: a struct per member, jobs before and after.

T time, B batch, H hidden, P projection (or H), D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..integers import ceil_div
from . import buffers, threads
from .jobs import (
    OPERANDS_IN,
    OPERANDS_OUT,
    PACK_BIAS,
    PACK_COLUMNS,
    PACK_GATES,
    ROWS_IN,
    ROWS_OUT,
    UNPACK_COLUMNS,
    UNPACK_GATES,
    VALUES_WORTH_THREADS,
    Job,
    JobsArgs,
)
from .problem import OWN, Problem, Table, Template, side_by_side

LINE = 16  # int64 of a barrier's counter, so that no two share a cache line
Strides = tuple[int, ...] | None  # of a tensor; None if there is none


class Jobs:
    """The jobs before a call's launches, or those after them; buffers by name (see ``Buffers``)."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.jobs, self.values = problem, list[Job](), 0

    @property
    def members(self) -> int:
        """How many threads the jobs are worth."""
        return self.problem.available if self.values >= VALUES_WORTH_THREADS else 1

    def pack_gates(self, packed: int, weight: object, depth: int) -> None:
        """The weight (4H, depth) into gate panels."""
        p = self.problem
        panel = p.terms(depth) * p.kernels.variant.gate_bytes
        self.jobs.append(Job(PACK_GATES, p.panels, packed, p.at(weight), depth, p.hidden, panel_bytes=panel))
        self.values += p.layer.gates * depth

    def pack_bias(self, packed: int, bias_ih: object, bias_hh: object) -> None:
        """Biases (4H,) into the gate panels of their sum; zeros for a layer without biases."""
        p = self.problem
        one, other = (p.at(bias) if p.layer.bias else 0 for bias in (bias_ih, bias_hh))
        self.jobs.append(Job(PACK_BIAS, p.panels, packed, one, 1, p.hidden, other=other))

    def pack_columns(self, packed: int, weight: object, columns: int, order: Table) -> None:
        """The weight (·, columns) into column panels; ``order``: which of its rows each k is."""
        p, depth = self.problem, len(order.values)
        panels = ceil_div(columns, p.block.panel)
        self.jobs.append(Job(PACK_COLUMNS, panels, packed, p.at(weight), depth, columns, order.address))
        self.values += depth * columns

    def unpack_gates(self, target: object, packed: int, depth: int, parts: int, stride: int) -> None:
        """Gate panels into a gradient (4H, depth)."""
        p = self.problem
        self.jobs.append(
            Job(
                UNPACK_GATES, p.panels, p.at(target), packed, depth, p.hidden,
                parts=parts, part_stride=stride,
            )
        )  # fmt: skip
        self.values += parts * p.layer.gates * depth

    def unpack_columns(self, target: object, packed: int, depth: int, columns: int, parts: int, stride: int) -> None:
        """Whole column panels into a gradient (depth, columns)."""
        p = self.problem
        self.jobs.append(
            Job(
                UNPACK_COLUMNS, ceil_div(columns, p.block.panel), p.at(target), packed, depth, columns,
                parts=parts, part_stride=stride,
            )
        )  # fmt: skip
        self.values += parts * depth * columns

    def rows_in(
        self, target: int, rows: Table, state: object, strides: Strides, direction: int, columns: int,
        operands: bool = False,
    ) -> None:  # fmt: skip
        """A user's state (D, B, columns), or zeros, to rows of whole vectors, or of operands, in sorted order."""
        p, source, source_rows = self.problem, 0, rows
        if strides is not None:
            source = p.at(state, direction * strides[0] * p.stored)
            source_rows = p.offsets(strides[1] * p.stored)
        self.jobs.append(
            Job(
                OPERANDS_IN if operands else ROWS_IN, p.batch, target, source, columns=columns,
                target_rows=rows.address, source_rows=source_rows.address,
            )
        )  # fmt: skip

    def rows_out(
        self, source: int, rows: Table, state: object, itemsize: int, direction: int, columns: int,
        operands: bool = False,
    ) -> None:  # fmt: skip
        """Rows in sorted order, of operands or not, to a new state (D, B, columns)."""
        p = self.problem
        target = p.at(state, direction * p.batch * columns * itemsize)
        self.jobs.append(
            Job(
                OPERANDS_OUT if operands else ROWS_OUT, p.batch, target, source, columns=columns,
                target_rows=p.offsets(columns * itemsize).address, source_rows=rows.address,
            )
        )  # fmt: skip

    def extend(self, other: Jobs) -> None:
        """Appends those of a layer of a stack."""
        self.jobs += other.jobs
        self.values += other.values

    def clear(self, target: int, size: int) -> None:
        """Zeroes ``size`` bytes, and those up to a whole vector."""
        values = ceil_div(size, self.problem.size)
        rows = self.problem.multiples(1, 1)
        self.jobs.append(Job(ROWS_IN, 1, target, 0, columns=values, target_rows=rows.address))


class Stage(NamedTuple):
    """Launches of one kernel: those that come first side by side, each followed by others on the same threads."""

    structs: np.ndarray  # (members of all launches, fields): those of a launch adjacent
    names: tuple[str, ...]  # of the fields
    members: int  # of each launch


class Placed(NamedTuple):
    """Where a stage's structs and counters lie in the array of arguments."""

    launch: threads.Launch
    structs: slice
    names: tuple[str, ...]
    counters: slice


Each = Callable[[int], None]  # called after each segment with its number


class Prepared:
    """All arguments of the kernels for one kind of call, with placeholders for addresses.

    A call fills them into one array of int64, which holds every argument struct and job; what points to another of
    them is an address in the buffer called "arguments".
    """

    def __init__(self, problem: Problem, before: Jobs, stages: Sequence[Stage], after: Jobs) -> None:
        self.problem = problem
        self._arrays: list[np.ndarray] = []
        self._length = 0  # values so far
        self._stages = [self._place(stage) for stage in stages]
        self._before, self._after = self._jobs(before), self._jobs(after)
        self._template = Template(np.concatenate(self._arrays))
        self._names = list(problem.buffers.numbers)[len(OWN) :]
        del self._arrays

    def _place(self, stage: Stage) -> Placed:
        structs, names, members = stage
        count, fields, launches = *structs.shape, len(structs) // members
        # never part of a launch: its members wait for each other
        together = members * side_by_side(members, self.problem.available)
        counters = slice(self._length + LINE, self._length + LINE * (launches + 1))  # on cache lines of their own
        counter = self._add(np.zeros((launches + 2, LINE), np.int64)) + 8 * LINE
        first = self.problem.buffers.at("arguments", 8 * self._length)
        structs[:, -2] = counter + np.arange(count) // members * 8 * LINE
        # A thread runs one launch after another.
        structs[:-together, -1] = first + np.arange(together, count) * 8 * fields
        place = slice(self._length, self._length + structs.size)
        return Placed(self._launch(structs, min(together, count)), place, names, counters)

    def _add(self, values: np.ndarray) -> int:
        """Appends ``values`` to the array; the placeholder of their address."""
        at = self.problem.buffers.at("arguments", 8 * self._length)
        self._arrays.append(values.reshape(-1))
        self._length += values.size
        return at

    def _launch(self, structs: np.ndarray, members: int) -> threads.Launch:
        begin = 8 * self._length
        self._add(structs)
        return threads.Launch(begin, members, 8 * structs.shape[1])

    def _jobs(self, jobs: Jobs) -> threads.Launch | None:
        if not jobs.jobs:
            return None
        first, members = self._add(np.array(jobs.jobs, np.int64)), jobs.members
        return self._launch(np.array([JobsArgs(first, len(jobs.jobs), m, members) for m in range(members)]), members)

    def run(self, kernels: Sequence[Any], tensors: dict[object, Any], each: Each | None = None) -> None:
        """Runs the stages, each with its kernel, with these tensors as the buffers of the same names.

        ``each``: what to do after each segment, if there are segments.
        """
        p, arguments = self.problem, np.empty(self._length, np.int64)
        scratch, base = buffers.scratch(p.buffers.scratch)
        here = buffers.address_of(arguments)
        addresses = [0, here, base, *[tensors[name].data_ptr() for name in self._names]]
        self._template.fill(arguments, np.array(addresses, np.int64))
        jobs = p.kernels.jobs()
        if self._before is not None:
            threads.run(jobs, self._before.at(here))
        self._run_stages(kernels, arguments, here, each)
        if self._after is not None:
            threads.run(jobs, self._after.at(here))
        del scratch  # in use until here

    def _run_stages(self, kernels: Sequence[Any], arguments: np.ndarray, here: int, each: Each | None) -> None:
        for kernel, stage in zip(kernels, self._stages, strict=True):
            threads.run(kernel, stage.launch.at(here), arguments[stage.counters])
