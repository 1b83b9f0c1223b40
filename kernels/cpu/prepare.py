"""The kernels' arguments for one kind of call: a struct per member, the jobs before and after, and scratch memory.

Prepared once per kind of call if all rows have all steps, because a small call takes less time than preparing it;
otherwise prepared for each call.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

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
from .problem import OWN, Active, Problem, Table, Template, side_by_side

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
        self.jobs.append(Job(PACK_GATES, p.panels, packed, p.buffers.at(weight), depth, p.hidden))
        self.values += p.layer.gates * depth

    def pack_bias(self, packed: int, bias_ih: object, bias_hh: object) -> None:
        """Biases (4H,) into the gate panels of their sum; zeros for a layer without biases."""
        p = self.problem
        one, other = (p.buffers.at(bias) if p.layer.bias else 0 for bias in (bias_ih, bias_hh))
        self.jobs.append(Job(PACK_BIAS, p.panels, packed, one, 1, p.hidden, other=other))

    def pack_columns(self, packed: int, weight: object, columns: int, order: Table) -> None:
        """The weight (·, columns) into column panels; ``order``: which of its rows each k is."""
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
            source = p.buffers.at(state, direction * strides[0] * p.stored)
            source_rows = p.offsets(strides[1] * p.stored)
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


class Prepared:
    """All arguments of the kernels for one kind of call, with placeholders for addresses.

    A call fills them into one array of int64, which holds every argument struct and job; what points to another of
    them is an address in the buffer called "arguments".
    """

    def __init__(
        self, problem: Problem, before: Jobs, launches: Sequence[np.ndarray], after: Jobs, members: int
    ) -> None:
        self.problem = problem
        self._arrays: list[np.ndarray] = []
        self._length = 0  # values so far
        structs, fields = np.concatenate(launches), launches[0].shape[1]
        # never part of a launch: its members wait for each other
        together = members * side_by_side(members, problem.available)
        self._counters = slice(LINE, LINE + LINE * (len(structs) // members))  # on cache lines of their own
        counters = self._add(np.zeros((len(structs) // members + 2, LINE), np.int64)) + 8 * LINE
        first = problem.buffers.at("arguments", 8 * self._length)
        structs[:, -2] = counters + np.arange(len(structs)) // members * 8 * LINE
        # A thread runs one launch after another.
        structs[:-together, -1] = first + np.arange(together, len(structs)) * 8 * fields
        self._launches = self._launch(structs, min(together, len(structs)))
        self._before, self._after = self._jobs(before), self._jobs(after)
        self._template = Template(np.concatenate(self._arrays))
        self._names = list(problem.buffers.numbers)[len(OWN) :]
        del self._arrays

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

    def run(self, kernel: Any, tensors: dict[object, Any]) -> None:
        """Runs the launches, with these tensors as the buffers of the same names."""
        p, arguments = self.problem, np.empty(self._length, np.int64)
        scratch, base = buffers.scratch(p.buffers.scratch)
        here = buffers.address_of(arguments)
        addresses = [0, here, base, *[tensors[name].data_ptr() for name in self._names]]
        self._template.fill(arguments, np.array(addresses, np.int64))
        jobs, counters = p.kernels.jobs(), arguments[self._counters]
        if self._before is not None:
            threads.run(jobs, self._before.at(here))
        threads.run(kernel, self._launches.at(here), counters)
        if self._after is not None:
            threads.run(jobs, self._after.at(here))
        del scratch  # in use until here


def prepared_for(prepare: Callable[..., Prepared], call: Call, available: int, form: NamedTuple) -> Prepared:
    """What ``prepare`` makes for this kind of call; kept for the next one if all rows are active at every step."""
    active = Active.of(call.rows)
    if active is not None:
        return prepare(Problem(call.layer, active, available), form)
    return _kept(prepare, call.layer, available, form)


@functools.lru_cache(maxsize=512)
def _kept(prepare: Callable[..., Prepared], layer: Layer, available: int, form: NamedTuple) -> Prepared:
    return prepare(Problem(layer, None, available), form)


forget = _kept.cache_clear


class ForwardForm(NamedTuple):
    """What a forward's arguments depend on in addition to the ``Problem``: strides of the tensors, and flags."""

    x: Strides
    y: Strides
    reset: Strides
    h_0: Strides
    c_0: Strides
    save: bool
    cells: bool


class BackwardForm(NamedTuple):
    """What a backward's arguments depend on in addition to the ``Problem``."""

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


def _geometry(p: Problem, form: ForwardForm | BackwardForm) -> dict[str, int]:
    """The arguments for the layout of the user's tensors of many steps."""
    names = [name for name in ("x", "y", "dx", "dy") if hasattr(form, name)]
    each = [p.geometry(name, getattr(form, name), p.stored) for name in names]
    return functools.reduce(operator.or_, each, p.geometry("reset", form.reset, 1))


def prepare_forward(problem: Problem, form: ForwardForm) -> Prepared:
    p, at = problem, problem.buffers.at
    plan = tiling.plan(
        p.steps, p.batch, p.hidden, p.width, p.inputs, p.block, p.size, max(1, p.available // p.directions)
    )
    borders = p.row_groups(plan, 0, p.batch)
    h_half = p.state_bytes(p.padded_width, borders)
    h_rows, c_rows = p.state_rows(p.padded_width, borders), p.state_rows(p.padded_hidden, borders)
    fused = plan.fused and not p.kernels.staged
    shared = p.shape | _geometry(p, form) | {
        "x": at("x"), "reset": at("reset") if form.reset else 0, "h_half": h_half,
        "chunk": plan.chunk, "chunk_tokens": plan.chunk * p.batch, "fused": int(fused),
    }  # fmt: skip
    stored = p.layer.dtype.itemsize
    before, after, launches = Jobs(p), Jobs(p), list[np.ndarray]()
    for direction in range(p.directions):
        scratch = _forward_scratch(p, plan, borders, fused, form.save)
        for half in (0, h_half):
            before.rows_in(scratch["h"] + half, h_rows, "h_0", form.h_0, direction, p.width)
        before.rows_in(scratch["c"], c_rows, "c_0", form.c_0, direction, p.hidden)
        before.pack_gates(scratch["w_x"], ("weight_ih", direction), p.inputs)
        before.pack_gates(scratch["w_h"], ("weight_hh", direction), p.width)
        before.pack_bias(scratch["bias"], ("bias_ih", direction), ("bias_hh", direction))
        if p.projected:
            before.pack_columns(scratch["w_r"], ("weight_hr", direction), p.width, p.multiples(p.hidden, 1))
        arguments = ForwardArgs(**shared | scratch | {
            "reverse": direction, "y": at("y", direction * p.width * stored),
            "gates": at(("gates", direction)) if form.save else 0,
            "cells": at(("cells", direction)) if form.cells else 0,
        })  # fmt: skip
        launches.append(p.members(arguments, plan, borders))
        after.rows_out(scratch["c"], c_rows, "c_n", stored, direction, p.hidden)
        last, last_rows = p.last_rows(scratch["h"], h_rows, h_half, direction)
        after.rows_out(last, last_rows, "h_n", stored, direction, p.width)
    return Prepared(p, before, launches, after, plan.members)


def _forward_scratch(p: Problem, plan: tiling.Plan, borders: list[int], fused: bool, save: bool) -> dict[str, int]:
    """The scratch of one direction; see ``ForwardArgs``."""
    size, staged, chunk_tokens, gate_bytes = p.size, p.kernels.staged, plan.chunk * p.batch, p.padded_gates * p.size
    state = p.state_bytes(p.padded_hidden, borders)
    return p.buffers.reserve(
        h=2 * p.state_bytes(p.padded_width, borders),
        c=state,
        m=state * p.projected,
        z=chunk_tokens * gate_bytes * (not fused and (not save or staged)),
        x_stage=plan.members * chunk_tokens * p.inputs * size * staged,
        table=plan.members * 2 * chunk_tokens * 8 * (not fused),
        w_x=gate_bytes * p.inputs,
        w_h=gate_bytes * p.width,
        w_r=column_panels_size(p.hidden, p.width, p.block.lanes) * size * p.projected,
        bias=gate_bytes,
    )


def prepare_backward(problem: Problem, form: BackwardForm) -> Prepared:
    p, at, needs, stored = problem, problem.buffers.at, form.needs, problem.layer.dtype.itemsize
    parts = p.parts()
    most = max(last - first for first, last, _ in parts)
    plan = tiling.plan(
        p.steps, most, p.hidden, p.width, p.inputs, p.block, p.size,
        max(1, p.available // (p.directions * len(parts))), backward=True,
    )  # fmt: skip
    by_part = [p.row_groups(plan, first, last) for first, last, _ in parts]
    borders = [0, *(last for own in by_part for last in own[1:])]
    shared = p.shape | _geometry(p, form) | {
        "x": at("x"), "reset": at("reset") if form.reset else 0,
        "chunk": plan.chunk, "chunk_tokens": plan.chunk * most,
        "panel_rows": p.multiples(max(p.batch, JOINED_ROWS), p.block.panel * p.size).address,
    }  # fmt: skip
    before, after, launches = Jobs(p), Jobs(p), list[np.ndarray]()
    # Parts that do not run at the same time use the same memory.
    together = min(side_by_side(plan.members, p.available), p.directions * len(parts))
    in_turn = [_part_scratch(p, plan.chunk * most, needs) for _ in range(together)]
    for direction in range(p.directions):
        scratch = _backward_scratch(p, borders, needs)
        _backward_jobs(p, form, scratch, borders, direction, before, after)
        whole = shared | scratch | {
            "dx": at(("dx", direction)) if needs.input else 0,
            "norms": at(("norms", direction)) if form.needs.norms else 0,
            "dy": at("dy", direction * p.width * stored) if form.dy else 0,
            "dcells": at(("dcells", direction)) if form.dcells else 0,
            "gates": at(("gates", direction)), "cells": at(("cells", direction)),
            "y": at("y", direction * p.width * stored), "reverse": direction,
        }  # fmt: skip
        sums, stride = _gradient_scratch(p, len(parts), needs)
        if needs.weights:
            _unpack_gradients(p, after, sums, len(parts), stride, direction)
        for index, ((first, last, starts), groups) in enumerate(zip(parts, by_part, strict=True)):
            own = {name: address and address + index * stride for name, address in sums.items()}
            arguments = BackwardArgs(
                **whole, **own, **in_turn[len(launches) % len(in_turn)],
                **p.chunks(first, last, plan.chunk, plan.chunk * most, direction),
                part_begin=first, part_end=last, part_starts=starts,
            )  # fmt: skip
            launches.append(p.members(arguments, plan, groups, index * plan.row_groups))
    return Prepared(p, before, launches, after, plan.members)


def _backward_jobs(
    p: Problem, form: BackwardForm, scratch: dict[str, int], borders: list[int], direction: int,
    before: Jobs, after: Jobs,
) -> None:  # fmt: skip
    """Appends the jobs for the states and weights of one direction."""
    needs, stored = form.needs, p.layer.dtype.itemsize
    dh_rows, dc_rows = p.state_rows(p.padded_width, borders), p.state_rows(p.padded_hidden, borders)
    h_rows, c_rows = p.multiples(p.batch, p.padded_width * p.size), p.multiples(p.batch, p.padded_hidden * p.size)
    before.clear(scratch["zero"], max(p.padded_hidden, p.padded_width))
    before.rows_in(scratch["dh"], dh_rows, "dh_n", form.dh_n, direction, p.width)
    before.rows_in(scratch["dc"], dc_rows, "dc_n", form.dc_n, direction, p.hidden)
    before.rows_in(scratch["h_0"], h_rows, "h_0", form.h_0, direction, p.width)
    before.rows_in(scratch["c_0"], c_rows, "c_0", form.c_0, direction, p.hidden)
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
    """Appends the jobs for the weight gradients of one direction; ``sums``: those of its first part."""

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
    """The scratch that the parts of one direction share; see ``BackwardArgs``."""
    size, lanes, gates = p.size, p.block.lanes, p.padded_gates
    state = p.state_bytes(p.padded_hidden, borders)
    return p.buffers.reserve(
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
    """The packed weight gradients of one direction's first part, and the bytes from a part to the next."""
    gates = p.padded_gates * p.size * needs.weights
    columns = p.columns * p.hidden * p.block.panel * p.size * needs.weights
    begin = p.buffers.scratch
    first, *_ = (
        p.buffers.reserve(dw_x=gates * p.inputs, dw_h=gates * p.width, db=gates, dw_r=columns * p.projected)
        for _ in range(parts)
    )
    return first, (p.buffers.scratch - begin) // parts


def _part_scratch(p: Problem, chunk_tokens: int, needs: Needs) -> dict[str, int]:
    """The scratch of one part of the batch; see ``BackwardArgs``."""
    column = chunk_tokens * p.size
    return p.buffers.reserve(
        dz=column * p.padded_gates,
        dh_chunk=column * p.columns * p.block.panel * p.projected,
        x_strips=column * p.inputs * needs.weights,
        h_strips=column * p.width * needs.weights,
        m_strips=column * p.hidden * p.projected * needs.weights,
        dx_stage=column * p.inputs * p.kernels.staged,
        table=chunk_tokens * 8,
    )
