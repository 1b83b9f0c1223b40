"""What the kernels of a kind of call are told: their records, the jobs before and after, and where scratch lies.

It is laid out once for a kind of call in which all rows live for all steps (a small one is over in less time than it
takes to do that anew), else at each call.

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..contract import Call, Layer, Needs
from ..integers import ceil_div
from . import buffers, threads, tiling
from .arguments import BackwardArgs, ForwardArgs
from .backward import JOINED_ROWS
from .jobs import (
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
    column_panels_size,
    gate_order,
)
from .problem import Alive, Problem, Table, Template, side_by_side

LINE = 16  # int64 of a barrier's counter, so that no two share a cache line
Strides = tuple[int, ...] | None  # of a tensor, in bytes; None where there is none


class Jobs:
    """The jobs before a call's launches, or after them; buffers by name (see ``Buffers``)."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.jobs, self.values = problem, list[Job](), 0

    @property
    def members(self) -> int:
        """How many threads they are worth."""
        return self.problem.available if self.values >= VALUES_WORTH_THREADS else 1

    def pack_gates(self, packed: int, weight: object, depth: int) -> None:
        """The weight (4H, depth) into gate panels."""
        p = self.problem
        self.jobs.append(Job(PACK_GATES, p.panels, packed, p.buffers.at(weight), depth, p.hidden))
        self.values += p.layer.gates * depth

    def pack_bias(self, packed: int, bias_ih: object, bias_hh: object) -> None:
        """(4H,) each into the gate panels of their sum; zeros where there are none."""
        p = self.problem
        one, other = (p.buffers.at(bias) if p.layer.bias else 0 for bias in (bias_ih, bias_hh))
        self.jobs.append(Job(PACK_BIAS, p.panels, packed, one, 1, p.hidden, other=other))

    def pack_columns(self, packed: int, weight: object, columns: int, order: Table) -> None:
        """The weight (·, columns) into column panels, its rows in that order."""
        p, depth = self.problem, len(order.values)
        panels = ceil_div(columns, p.block.panel)
        self.jobs.append(Job(PACK_COLUMNS, panels, packed, p.buffers.at(weight), depth, columns, order.address))
        self.values += depth * columns

    def unpack_gates(self, target: object, packed: int, depth: int, parts: int, stride: int) -> None:
        """Gate panels into a gradient (4H, depth)."""
        p = self.problem
        self.jobs.append(
            Job(
                UNPACK_GATES, p.panels, p.buffers.at(target), packed, depth, p.hidden,
                parts=parts, part_stride=stride,
            )
        )  # fmt: skip
        self.values += parts * p.layer.gates * depth

    def unpack_columns(self, target: object, packed: int, depth: int, columns: int, parts: int, stride: int) -> None:
        """Whole column panels into a gradient (depth, columns)."""
        p = self.problem
        self.jobs.append(
            Job(
                UNPACK_COLUMNS, ceil_div(columns, p.block.panel), p.buffers.at(target), packed, depth, columns,
                parts=parts, part_stride=stride,
            )
        )  # fmt: skip
        self.values += parts * depth * columns

    def rows_in(self, target: int, rows: Table, state: object, strides: Strides, direction: int, columns: int) -> None:
        """A user's state (D, B, columns), or zeros, to rows of whole vectors in sorted order."""
        p, source, source_rows = self.problem, 0, rows
        if strides is not None:
            source, source_rows = p.buffers.at(state, direction * strides[0]), p.offsets(strides[1])
        self.jobs.append(
            Job(
                ROWS_IN, p.batch, target, source, columns=columns,
                target_rows=rows.address, source_rows=source_rows.address,
            )
        )  # fmt: skip

    def rows_out(self, source: int, rows: Table, state: object, itemsize: int, direction: int, columns: int) -> None:
        """Rows in sorted order to a new state (D, B, columns)."""
        p = self.problem
        target = p.buffers.at(state, direction * p.batch * columns * itemsize)
        self.jobs.append(
            Job(
                ROWS_OUT, p.batch, target, source, columns=columns,
                target_rows=p.offsets(columns * itemsize).address, source_rows=rows.address,
            )
        )  # fmt: skip

    def clear(self, target: int, values: int) -> None:
        rows = self.problem.multiples(1, 1)
        self.jobs.append(Job(ROWS_IN, 1, target, 0, columns=values, target_rows=rows.address))


class Layout:
    """All that the kernels of a kind of call are told, but for addresses.

    At a call it becomes one block of int64, in which every record and job lies; what points to another of them is
    an address in the buffer called "block".
    """

    def __init__(
        self, problem: Problem, before: Jobs, records: Sequence[np.ndarray], after: Jobs, members: int
    ) -> None:
        self.problem = problem
        self._parts: list[np.ndarray] = []
        self._length = 0  # values so far
        launches, fields = np.concatenate(records), records[0].shape[1]
        together = members * side_by_side(members, problem.available)  # a launch is never cut: its members wait
        self._counters = slice(LINE, LINE + LINE * (len(launches) // members))  # on lines of their own
        counters = self._add(np.zeros((len(launches) // members + 2, LINE), np.int64)) + 8 * LINE
        first = problem.buffers.at("block", 8 * self._length)
        launches[:, -2] = counters + np.arange(len(launches)) // members * 8 * LINE
        # A thread works off one launch after another.
        launches[:-together, -1] = first + np.arange(together, len(launches)) * 8 * fields
        self._launches = self._launch(launches, min(together, len(launches)))
        self._before, self._after = self._jobs(before), self._jobs(after)
        self._template = Template(np.concatenate(self._parts))
        self._numbers = problem.buffers.numbers
        del self._parts

    def _add(self, values: np.ndarray) -> int:
        """A place in the block for ``values``: what stands for its address."""
        at = self.problem.buffers.at("block", 8 * self._length)
        self._parts.append(values.reshape(-1))
        self._length += values.size
        return at

    def _launch(self, records: np.ndarray, members: int) -> threads.Launch:
        begin = 8 * self._length
        self._add(records)
        return threads.Launch(begin, members, 8 * records.shape[1])

    def _jobs(self, table: Jobs) -> threads.Launch | None:
        if not table.jobs:
            return None
        jobs, members = self._add(np.array(table.jobs, np.int64)), table.members
        return self._launch(np.array([JobsArgs(jobs, len(table.jobs), m, members) for m in range(members)]), members)

    def run(self, kernel: Any, tensors: dict[object, Tensor | np.ndarray | None]) -> None:
        """Works off the launches, with these tensors as the buffers of the same names."""
        p, block = self.problem, np.empty(self._length, np.int64)
        scratch, base = buffers.room(p.buffers.scratch)
        here = block.ctypes.data
        own = {"block": here, "scratch": base}
        addresses = [0, *(own[name] if name in own else _address(tensors[name]) for name in self._numbers)]
        self._template.fill(block, np.array(addresses, np.int64))
        jobs, counters = p.kernels.jobs(), block[self._counters]
        if self._before is not None:
            threads.run(jobs, self._before.at(here))
        threads.run(kernel, self._launches.at(here), counters)
        if self._after is not None:
            threads.run(jobs, self._after.at(here))
        del scratch  # until here


def _address(tensor: Any) -> int:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else tensor.ctypes.data


def layout_of(lay: Callable[..., Layout], call: Call, available: int, given: NamedTuple) -> Layout:
    """The layout of this kind of call: one that is kept where all rows are alive at every step, else a new one."""
    alive = Alive.of(call.rows)
    return lay(Problem(call.layer, alive, available), given) if alive else _kept(lay, call.layer, available, given)


@functools.lru_cache(maxsize=512)
def _kept(lay: Callable[..., Layout], layer: Layer, available: int, given: NamedTuple) -> Layout:
    return lay(Problem(layer, None, available), given)


forget = _kept.cache_clear


class ForwardGiven(NamedTuple):
    """What else a forward's arguments depend on."""

    x: Strides
    y: Strides
    reset: Strides
    h_0: Strides
    c_0: Strides
    save: bool
    cells: bool


class BackwardGiven(NamedTuple):
    """What else a backward's arguments depend on."""

    x: Strides
    y: Strides
    reset: Strides
    h_0: Strides
    c_0: Strides
    dx: Strides
    dy: Strides
    dh_n: Strides
    dc_n: Strides
    dcells: bool
    needs: Needs
    norms: bool


def lay_forward(problem: Problem, given: ForwardGiven) -> Layout:
    p, at = problem, problem.buffers.at
    plan = tiling.plan(
        p.steps, p.batch, p.hidden, p.width, p.inputs, p.block, p.size, max(1, p.available // p.directions)
    )
    borders = p.row_groups(plan, 0, p.batch)
    h_half = p.state_bytes(p.padded_width, borders)
    h_rows, c_rows = p.state_rows(p.padded_width, borders), p.state_rows(p.padded_hidden, borders)
    fused = plan.fused and not p.kernels.staged
    shared = p.shape | p.geometry("x", given.x) | p.geometry("y", given.y) | p.geometry("reset", given.reset) | {
        "x": at("x"), "reset": at("reset") if given.reset else 0, "h_half": h_half,
        "chunk": plan.chunk, "chunk_rows": plan.chunk * p.batch, "fused": int(fused),
    }  # fmt: skip
    stored = p.layer.dtype.itemsize
    before, after, records = Jobs(p), Jobs(p), list[np.ndarray]()
    for direction in range(p.directions):
        scratch = _forward_scratch(p, plan, borders, fused, given.save)
        for half in (0, h_half):
            before.rows_in(scratch["h"] + half, h_rows, "h_0", given.h_0, direction, p.width)
        before.rows_in(scratch["c"], c_rows, "c_0", given.c_0, direction, p.hidden)
        before.pack_gates(scratch["w_x"], ("weight_ih", direction), p.inputs)
        before.pack_gates(scratch["w_h"], ("weight_hh", direction), p.width)
        before.pack_bias(scratch["bias"], ("bias_ih", direction), ("bias_hh", direction))
        if p.projected:
            before.pack_columns(scratch["w_r"], ("weight_hr", direction), p.width, p.multiples(p.hidden, 1))
        arguments = ForwardArgs(**shared | scratch | {
            "reverse": direction, "y": at("y", direction * p.width * stored),
            "gates": at(("gates", direction)) if given.save else 0,
            "cells": at(("cells", direction)) if given.cells else 0,
        })  # fmt: skip
        records.append(p.records(arguments, plan, borders))
        after.rows_out(scratch["c"], c_rows, "c_n", stored, direction, p.hidden)
        last, last_rows = p.last_rows(scratch["h"], h_rows, h_half, direction)
        after.rows_out(last, last_rows, "h_n", stored, direction, p.width)
    return Layout(p, before, records, after, plan.members)


def _forward_scratch(p: Problem, plan: tiling.Plan, borders: list[int], fused: bool, save: bool) -> dict[str, int]:
    """The scratch of one direction; see ``ForwardArgs``."""
    size, staged, chunk_rows, gate_bytes = p.size, p.kernels.staged, plan.chunk * p.batch, p.padded_gates * p.size
    state = p.state_bytes(p.padded_hidden, borders)
    return p.buffers.lay(
        h=2 * p.state_bytes(p.padded_width, borders),
        c=state,
        m=state * p.projected,
        z=chunk_rows * gate_bytes * (not fused and (not save or staged)),
        x_stage=plan.members * chunk_rows * p.inputs * size * staged,
        table=plan.members * 2 * chunk_rows * 8 * (not fused),
        w_x=gate_bytes * p.inputs,
        w_h=gate_bytes * p.width,
        w_r=column_panels_size(p.hidden, p.width, p.block.lanes) * size * p.projected,
        bias=gate_bytes,
    )


def lay_backward(problem: Problem, given: BackwardGiven) -> Layout:
    p, at, needs, stored = problem, problem.buffers.at, given.needs, problem.layer.dtype.itemsize
    parts = p.parts()
    most = max(last - first for first, last, _ in parts)
    plan = tiling.plan(
        p.steps, most, p.hidden, p.width, p.inputs, p.block, p.size,
        max(1, p.available // (p.directions * len(parts))), backward=True,
    )  # fmt: skip
    shares = [p.row_groups(plan, first, last) for first, last, _ in parts]
    borders = [0, *(last for share in shares for last in share[1:])]
    shared = p.shape | p.geometry("x", given.x) | p.geometry("y", given.y) | p.geometry("reset", given.reset)
    shared |= p.geometry("dx", given.dx) | p.geometry("dy", given.dy) | {
        "x": at("x"), "reset": at("reset") if given.reset else 0,
        "chunk": plan.chunk, "chunk_rows": plan.chunk * most,
        "panel_rows": p.multiples(max(p.batch, JOINED_ROWS), p.block.panel * p.size).address,
    }  # fmt: skip
    before, after, records = Jobs(p), Jobs(p), list[np.ndarray]()
    # Parts that do not run at the same time use the same memory.
    together = min(side_by_side(plan.members, p.available), p.directions * len(parts))
    in_turn = [_part_scratch(p, plan.chunk * most, needs) for _ in range(together)]
    for direction in range(p.directions):
        scratch = _backward_scratch(p, borders, needs)
        _backward_jobs(p, given, scratch, borders, direction, before, after)
        whole = shared | scratch | {
            "dx": at(("dx", direction)) if needs.input else 0,
            "norms": at(("norms", direction)) if given.norms else 0,
            "dy": at("dy", direction * p.width * stored) if given.dy else 0,
            "dcells": at(("dcells", direction)) if given.dcells else 0,
            "gates": at(("gates", direction)), "cells": at(("cells", direction)),
            "y": at("y", direction * p.width * stored), "reverse": direction,
        }  # fmt: skip
        sums, stride = _gradient_scratch(p, len(parts), needs)
        if needs.weights:
            _unpack_gradients(p, after, sums, len(parts), stride, direction)
        for index, ((first, last, starts), share) in enumerate(zip(parts, shares, strict=True)):
            own = {name: token and token + index * stride for name, token in sums.items()}
            arguments = BackwardArgs(
                **whole, **own, **in_turn[len(records) % len(in_turn)],
                **p.chunks(first, last, plan.chunk, plan.chunk * most, direction),
                part_begin=first, part_end=last, part_starts=starts,
            )  # fmt: skip
            records.append(p.records(arguments, plan, share, index * plan.row_groups))
    return Layout(p, before, records, after, plan.members)


def _backward_jobs(
    p: Problem, given: BackwardGiven, scratch: dict[str, int], borders: list[int], direction: int,
    before: Jobs, after: Jobs,
) -> None:  # fmt: skip
    """What becomes of the states and weights of one direction."""
    needs, stored = given.needs, p.layer.dtype.itemsize
    dh_rows, dc_rows = p.state_rows(p.padded_width, borders), p.state_rows(p.padded_hidden, borders)
    h_rows, c_rows = p.multiples(p.batch, p.padded_width * p.size), p.multiples(p.batch, p.padded_hidden * p.size)
    before.clear(scratch["zero"], max(p.padded_hidden, p.padded_width))
    before.rows_in(scratch["dh"], dh_rows, "dh_n", given.dh_n, direction, p.width)
    before.rows_in(scratch["dc"], dc_rows, "dc_n", given.dc_n, direction, p.hidden)
    before.rows_in(scratch["h_0"], h_rows, "h_0", given.h_0, direction, p.width)
    before.rows_in(scratch["c_0"], c_rows, "c_0", given.c_0, direction, p.hidden)
    order = p.table(gate_order(p.hidden, p.block.lanes))
    before.pack_columns(scratch["w_h"], ("weight_hh", direction), p.width, order)
    if needs.input:
        before.pack_columns(scratch["w_x"], ("weight_ih", direction), p.inputs, order)
    if p.projected:
        before.pack_columns(scratch["w_r"], ("weight_hr", direction), p.hidden, p.multiples(p.width, 1))
    if needs.h_0:
        after.rows_out(scratch["dh"], dh_rows, "grad_h", stored, direction, p.width)
    if needs.c_0:
        after.rows_out(scratch["dc"], dc_rows, "grad_c", stored, direction, p.hidden)


def _unpack_gradients(p: Problem, after: Jobs, sums: dict[str, int], parts: int, stride: int, direction: int) -> None:
    """The weight gradients of one direction, from the sums of its parts, the first at ``sums``."""

    def of(name: str) -> object:
        return f"grad of {name}", direction

    after.unpack_gates(of("weight_ih"), sums["dw_x"], p.inputs, parts, stride)
    after.unpack_gates(of("weight_hh"), sums["dw_h"], p.width, parts, stride)
    if p.layer.bias:
        after.unpack_gates(of("bias_ih"), sums["db"], 1, parts, stride)
        after.unpack_gates(of("bias_hh"), sums["db"], 1, 1, 0)  # by now the sum of all parts
    if p.projected:
        after.unpack_columns(of("weight_hr"), sums["dw_r"], p.hidden, p.width, parts, stride)


def _backward_scratch(p: Problem, borders: list[int], needs: Needs) -> dict[str, int]:
    """What the parts of one direction share; see ``BackwardArgs``."""
    size, lanes, gates = p.size, p.block.lanes, p.padded_gates
    state = p.state_bytes(p.padded_hidden, borders)
    return p.buffers.lay(
        zero=max(p.padded_hidden, p.padded_width) * size,
        dh=p.state_bytes(p.padded_width, borders),
        dc=state,
        h_0=p.batch * p.padded_width * size,
        c_0=p.batch * p.padded_hidden * size,
        dm=state * p.projected,
        w_h=column_panels_size(gates, p.width, lanes) * size,
        w_x=column_panels_size(gates, p.inputs, lanes) * size * needs.input,
        w_r=column_panels_size(p.width, p.hidden, lanes) * size * p.projected,
    )


def _gradient_scratch(p: Problem, parts: int, needs: Needs) -> tuple[dict[str, int], int]:
    """The packed weight gradients of one direction's first part, and how many bytes on those of the next lie."""
    gates = p.padded_gates * p.size * needs.weights
    columns = p.columns * p.hidden * p.block.panel * p.size * needs.weights
    begin = p.buffers.scratch
    first, *_ = (
        p.buffers.lay(dw_x=gates * p.inputs, dw_h=gates * p.width, db=gates, dw_r=columns * p.projected)
        for _ in range(parts)
    )
    return first, (p.buffers.scratch - begin) // parts


def _part_scratch(p: Problem, chunk_rows: int, needs: Needs) -> dict[str, int]:
    """What a part of the batch has for itself; see ``BackwardArgs``."""
    row = chunk_rows * p.size
    return p.buffers.lay(
        dz=row * p.padded_gates,
        dh_chunk=row * p.columns * p.block.panel * p.projected,
        x_strips=row * p.inputs * needs.weights,
        h_strips=row * p.width * needs.weights,
        m_strips=row * p.hidden * p.projected * needs.weights,
        dx_stage=row * p.inputs * p.kernels.staged,
        table=chunk_rows * 8,
    )
