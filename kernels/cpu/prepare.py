"""The kernels' arguments for one kind of call: from the problem and the layout of its tensors to what is launched.

Prepared once per kind of call if all rows have all steps, because a small call takes less time than preparing it;
otherwise prepared for each call.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..contract import Call, Layer, Needs
from ..integers import ceil_div
from . import tiling
from .arguments import BackwardArgs, ForwardArgs
from .backward import JOINED_ROWS
from .jobs import column_panels_size, gate_order
from .pipeline import BUFFER
from .prepared import Jobs, Prepared, Stage, Strides
from .problem import Active, Problem, side_by_side
from .segments import Segmented


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
    y: Strides  # None: not wanted
    reset: Strides
    h_0: Strides
    c_0: Strides
    gates: bool
    cells: bool
    borders: bool  # the states between segments are kept
    again: bool = False  # a segment at a time, from its border, for backward

    @staticmethod
    def of_segment(x: Strides, reset: Strides) -> ForwardForm:
        """Of a forward that is computed again."""
        return ForwardForm(x, None, reset, None, None, True, True, True, again=True)


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
    before, after = Jobs(problem), Jobs(problem)
    return Prepared(problem, before, [forward_stage(problem, form, before, after)], after)


def forward_stage(p: Problem, form: ForwardForm, before: Jobs, after: Jobs) -> Stage:
    """The launches of a forward, one a direction; appends its jobs."""
    at, stored = p.at, p.layer.dtype.itemsize
    plan = tiling.plan(
        p.steps, p.batch, p.hidden, p.width, p.inputs, p.block, p.size, max(1, p.available // p.directions)
    )
    groups = p.row_groups(plan, 0, p.batch)
    h_row, m_row = p.operand_row(p.width), p.operand_row(p.hidden)
    h_half = p.state_bytes(h_row, groups)
    fused = plan.fused and (p.kernels.products.tiled or not p.kernels.staged)
    shared = p.shape | _geometry(p, form) | {
        "x": at("x"), "reset": at("reset") if form.reset else 0, "h_half": h_half,
        "chunk": plan.chunk, "chunk_tokens": plan.chunk * p.batch, "fused": int(fused),
        "segment": p.layer.segment * form.borders, "resume": int(form.again),
        "h_rows": p.multiples(p.batch, h_row).address, "m_rows": p.multiples(p.batch, m_row).address,
        "stage_rows": p.multiples(p.batch, p.operand_row(p.inputs)).address,
        "sums_rows": p.multiples(p.batch, p.padded_width * p.size).address,
    }  # fmt: skip
    structs = []
    for direction in range(p.directions):
        scratch = _forward_scratch(p, plan, groups, fused, form.gates)
        _pack_forward(p, scratch, direction, before)
        _clear_padding(p, scratch, form, before)
        if not form.again:
            _forward_states(p, form, scratch, groups, direction, before, after)
        borders = {name: at((name, direction)) if form.borders else 0 for name in ("borders_h", "borders_c")}
        arguments = ForwardArgs(**shared | scratch | borders | {
            "reverse": direction, "y": at("y", direction * p.width * stored) if form.y else 0,
            "gates": at(("gates", direction)) if form.gates else 0,
            "cells": at(("cells", direction)) if form.cells else 0,
        })  # fmt: skip
        structs.append(p.members(arguments, plan, groups))
    return Stage(np.concatenate(structs), ForwardArgs._fields, plan.members)


def _pack_forward(p: Problem, scratch: dict[str, int], direction: int, before: Jobs) -> None:
    """Appends the jobs for the weights of one direction."""
    before.pack_gates(scratch["w_x"], ("weight_ih", direction), p.inputs)
    before.pack_gates(scratch["w_h"], ("weight_hh", direction), p.width)
    before.pack_bias(scratch["bias"], ("bias_ih", direction), ("bias_hh", direction))
    if p.projected:
        before.pack_columns(scratch["w_r"], ("weight_hr.T", direction), p.width, p.multiples(p.hidden, 1))


def _clear_padding(p: Problem, scratch: dict[str, int], form: ForwardForm, before: Jobs) -> None:
    """Appends the jobs for what rows of operands have beyond H: nothing writes it, and products of pairs read it."""
    if p.kernels.products.paired:
        if p.projected:
            before.clear(scratch["m"], scratch["sums"] - scratch["m"])
        if form.again:
            before.clear(scratch["h"], scratch["c"] - scratch["h"])


def _forward_states(
    p: Problem, form: ForwardForm, scratch: dict[str, int], groups: list[int], direction: int,
    before: Jobs, after: Jobs,
) -> None:  # fmt: skip
    """Appends the jobs for the states of one direction."""
    stored, h_half = p.layer.dtype.itemsize, p.state_bytes(p.operand_row(p.width), groups)
    h_rows, c_rows = p.state_rows(p.operand_row(p.width), groups), p.state_rows(p.padded_hidden * p.size, groups)
    for half in (0, h_half):
        before.rows_in(scratch["h"] + half, h_rows, "h_0", form.h_0, direction, p.width, operands=True)
    before.rows_in(scratch["c"], c_rows, "c_0", form.c_0, direction, p.hidden)
    after.rows_out(scratch["c"], c_rows, "c_n", stored, direction, p.hidden)
    last, last_rows = p.last_rows(scratch["h"], h_rows, h_half, direction)
    after.rows_out(last, last_rows, "h_n", stored, direction, p.width, operands=True)


def _forward_scratch(p: Problem, plan: tiling.Plan, groups: list[int], fused: bool, gates: bool) -> dict[str, int]:
    """The scratch of one direction; see ``ForwardArgs``."""
    size, staged, chunk_tokens, gate_bytes = p.size, p.kernels.staged, plan.chunk * p.batch, p.padded_gates * p.size
    x_row, h_row, m_row, beyond = *map(p.operand_row, (p.inputs, p.width, p.hidden)), p.rows_beyond
    return p.buffers.reserve(
        h=2 * p.state_bytes(h_row, groups) + beyond * h_row,
        c=p.state_bytes(p.padded_hidden * size, groups),
        m=(p.state_bytes(m_row, groups) + beyond * m_row) * p.projected,
        sums=p.batch * p.padded_width * size * (p.projected and p.kernels.products.paired),
        o=plan.members * (p.block.rows * p.block.lanes * size + BUFFER * p.kernels.products.tiled),
        z=(chunk_tokens + beyond) * gate_bytes * (not fused and (not gates or staged)),
        x_stage=(plan.members * chunk_tokens + beyond) * x_row * staged,
        table=plan.members * 2 * chunk_tokens * 8 * (not fused),
        w_x=gate_bytes * p.terms(p.inputs),
        w_h=gate_bytes * p.terms(p.width),
        w_r=column_panels_size(p.terms(p.hidden), p.width, p.block.lanes) * size * p.projected,
        bias=gate_bytes,
    )


def prepare_backward(problem: Problem, form: BackwardForm) -> Prepared:
    before, after = Jobs(problem), Jobs(problem)
    stage = backward_stage(problem, form, before, after)
    if not problem.layer.segment:
        return Prepared(problem, before, [stage], after)
    again = forward_stage(problem, ForwardForm.of_segment(form.x, form.reset), before, after)
    return Segmented(problem, before, [again, stage], after)


def backward_stage(p: Problem, form: BackwardForm, before: Jobs, after: Jobs) -> Stage:
    """The launches of a backward, one a direction and part of the batch; appends its jobs."""
    at, needs, stored = p.at, form.needs, p.layer.dtype.itemsize
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
        "panel_rows": p.multiples(max(p.batch, JOINED_ROWS), p.block.panel * p.operand_bytes).address,
        "h_rows": p.multiples(p.batch, p.padded_width * p.size).address,
        "m_rows": p.multiples(p.batch, p.padded_hidden * p.size).address,
        "dh_operand_rows": p.multiples(p.batch, p.operand_row(p.width)).address,
        "h_0_rows": p.offsets(form.h_0[1] * p.stored).address if form.h_0 else 0,
        "ones": p.ones(p.terms(plan.chunk * most)) if p.kernels.products.paired else 0,
    }  # fmt: skip
    structs: list[np.ndarray] = []
    # Parts that do not run at the same time use the same memory, unless they are interrupted between segments.
    together = p.directions * len(parts)
    if not p.layer.segment:
        together = min(together, side_by_side(plan.members, p.available))
    in_turn = [_part_scratch(p, plan.chunk * most, needs) for _ in range(together)]
    for direction in range(p.directions):
        scratch = _backward_scratch(p, borders, needs)
        _backward_jobs(p, form, scratch, borders, direction, before, after)
        whole = shared | scratch | {
            "dx": at(("dx", direction)) if needs.input else 0,
            "norms": at(("norms", direction)) if form.needs.norms else 0,
            "dy": at("dy", direction * p.width * stored) if form.dy else 0,
            "dcells": at(("dcells", direction)) if form.dcells else 0,
            "h_0": at("h_0", direction * form.h_0[0] * stored) if form.h_0 else 0,
            "gates": at(("gates", direction)), "cells": at(("cells", direction)),
            "y": at("y", direction * p.width * stored), "reverse": direction,
        }  # fmt: skip
        sums, stride = _gradient_scratch(p, len(parts), needs)
        if needs.weights:
            _unpack_gradients(p, after, sums, len(parts), stride, direction)
        for index, ((first, last, starts), groups) in enumerate(zip(parts, by_part, strict=True)):
            own = {name: address and address + index * stride for name, address in sums.items()}
            arguments = BackwardArgs(
                **whole, **own, **in_turn[len(structs) % len(in_turn)],
                **p.chunks(first, last, plan.chunk, plan.chunk * most, direction),
                part_begin=first, part_end=last, part_starts=starts,
            )  # fmt: skip
            structs.append(p.members(arguments, plan, groups, index * plan.row_groups))
    return Stage(np.concatenate(structs), BackwardArgs._fields, plan.members)


def _backward_jobs(
    p: Problem, form: BackwardForm, scratch: dict[str, int], borders: list[int], direction: int,
    before: Jobs, after: Jobs,
) -> None:  # fmt: skip
    """Appends the jobs for the states and weights of one direction."""
    needs, stored = form.needs, p.layer.dtype.itemsize
    dh_rows, dc_rows = (p.state_rows(padded * p.size, borders) for padded in (p.padded_width, p.padded_hidden))
    c_rows = p.multiples(p.batch, p.padded_hidden * p.size)
    before.clear(scratch["zero"], _zero_bytes(p))
    if scratch["dh_operands"] != scratch["dh"] and p.projected:
        before.clear(scratch["dh_operands"], p.state_bytes(p.operand_row(p.width), borders))
    before.rows_in(scratch["dh"], dh_rows, "dh_n", form.dh_n, direction, p.width)
    before.rows_in(scratch["dc"], dc_rows, "dc_n", form.dc_n, direction, p.hidden)
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
    size, lanes, gates, h_row = p.size, p.block.lanes, p.terms(p.padded_gates), p.operand_row(p.width)
    state, own = p.state_bytes(p.padded_hidden * size, borders), p.projected and p.kernels.products.paired
    scratch = p.buffers.reserve(
        zero=_zero_bytes(p),
        dh=p.state_bytes(p.padded_width * size, borders),
        dh_operands=(p.state_bytes(h_row, borders) + p.rows_beyond * h_row) * own,
        dc=state,
        c_0=p.batch * p.padded_hidden * size,
        dm=state * p.projected,
        w_h=column_panels_size(gates, p.width, lanes) * size,
        w_x=column_panels_size(gates, p.inputs, lanes) * size * needs.input,
        w_r=column_panels_size(p.terms(p.width), p.hidden, lanes) * size * p.projected,
    )
    return scratch if own else scratch | {"dh_operands": scratch["dh"] * p.projected}


def _zero_bytes(p: Problem) -> int:
    """Bytes of zeros that stand for the widest row."""
    return max(p.padded_hidden, p.padded_width, p.block.padded(p.inputs)) * p.size


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
    column, products = p.terms(chunk_tokens) * p.size, p.kernels.products
    strips = {"x_strips": p.inputs, "h_strips": p.width, "m_strips": p.hidden * p.projected}
    if products.tiled:
        strips = {name: ceil_div(count, p.block.rows) * p.block.rows for name, count in strips.items()}
    scratch = p.buffers.reserve(
        dz=(chunk_tokens + p.rows_beyond) * p.padded_gates * p.operand_bytes,
        dz_terms=column * p.padded_gates * needs.weights * products.paired,
        dh_chunk=column * p.columns * p.block.panel * p.projected,
        **{name: column * count * needs.weights for name, count in strips.items()},
        m_stage=chunk_tokens * p.hidden * p.stored * p.projected * needs.weights,
        dx_stage=chunk_tokens * p.inputs * p.size * p.kernels.staged,
        table=4 * p.terms(chunk_tokens) * products.values * 8,
    )
    return scratch if products.paired else scratch | {"dz_terms": scratch["dz"]}
