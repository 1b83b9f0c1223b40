"""The Numba backend of the contract: host code, from tensors to launches and back.

Everything that needs memory or a decision is here; the arithmetic is in ``lstm.py``.  A call asks
``tiling.plan`` how to share the work and works off three launches: jobs that pack the weights and read the states, one
launch a direction and part of the batch, side by side where threads allow, and jobs that write what is left
(``jobs.py``).  What these are told is drawn once for a kind of call (``_Drawing``): a small call is over in less
time than it takes to do that anew.

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, WeightGradients, Weights
from ..gate_statistics import sampled_rows
from ..integers import ceil_div
from . import buffers, process, threads, tiling
from .arguments import BackwardArgs, ForwardArgs
from .backward import JOINED_ROWS, NORM_PANELS
from .jobs import (
    PACK_BIAS,
    PACK_COLUMNS,
    PACK_GATES,
    ROWS_IN,
    ROWS_OUT,
    UNPACK_COLUMNS,
    UNPACK_GATES,
    Job,
    column_panels_size,
    gate_order,
    run,
)
from .problem import DTYPES, Alive, Kind, Problem, Table, Template, kernels_of, launch, side_by_side, starts_of
from .statistics import statistics

Strides = tuple[int, ...] | None  # of a tensor, in bytes; None where there is none


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells."""
    kernels = kernels_of(layer.dtype)
    padded = kernels.block.padded(layer.hidden_size)
    sizes = ((4 * padded, layer.dtype), (padded, kernels.compute))
    return [((room * width,), dtype) for width, dtype in sizes for _ in range(layer.directions)]


def prewarm(layer: Layer, *, training: bool) -> None:
    """Compiles, or loads from the disk cache, the kernels that ``layer`` will use."""
    kernels = kernels_of(layer.dtype)
    kernels.jobs()
    kernels.forward()
    if training:
        kernels.backward()
    threads.prewarm()


class _Jobs:
    """The jobs before a call's launches, or after them; buffers by name (see ``Buffers``)."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.jobs, self.values = problem, list[Job](), 0

    def pack_gates(self, packed: int, weight: object, depth: int) -> None:
        """The weight (4H, depth) into gate panels."""
        p = self.problem
        self.jobs.append(Job(PACK_GATES, p.panels, packed, p.buffers.at(weight), depth, p.hidden))
        self.values += 4 * p.hidden * depth

    def pack_bias(self, packed: int, bias_ih: object, bias_hh: object) -> None:
        """(4H,) each into the gate panels of their sum; zeros where there are none."""
        p = self.problem
        one, other = (p.buffers.at(bias) if p.kind.bias else 0 for bias in (bias_ih, bias_hh))
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
        self.values += parts * 4 * p.hidden * depth

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


class _Drawing:
    """All that the kernels of a kind of call are told, but for addresses."""

    def __init__(self, problem: Problem, before: _Jobs, records: list[np.ndarray], after: _Jobs, members: int) -> None:
        self.problem, self.members = problem, members
        self._before, self._after = (Template(jobs.jobs or np.empty((0, len(Job._fields)))) for jobs in (before, after))
        self._values = before.values, after.values
        self._records = Template(np.concatenate(records))

    def run(self, kernel: Any, tensors: dict[object, Tensor | np.ndarray | None]) -> None:
        """Works off the launches, with these tensors as the buffers of the same names."""
        p, available = self.problem, self.problem.available
        scratch, base = buffers.room(p.buffers.scratch)
        addresses = np.zeros(len(p.buffers.numbers) + 1, np.int64)
        for name, number in p.buffers.numbers.items():
            addresses[number] = base if name == "scratch" else _address(tensors[name])
        jobs = p.kernels.jobs()
        run(jobs, self._before.filled(addresses), available, self._values[0])
        launch(kernel, self._records.filled(addresses), self.members, available)
        if len(self._after):
            run(jobs, self._after.filled(addresses), available, self._values[1])
        del scratch  # until here


def _address(tensor: Any) -> int:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else tensor.ctypes.data


def _strides(tensor: Tensor | None) -> Strides:
    return None if tensor is None else tuple(stride * tensor.itemsize for stride in tensor.stride())


def _rows_dense(tensor: Tensor | None) -> Any:
    """``tensor``, its last dimension without gaps."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _parameters(weights: tuple[Weights, ...], compute: torch.dtype, forward: bool) -> dict[object, Tensor | None]:
    """The weights as the jobs read them, by (name, direction): contiguous, in the compute dtype."""
    named: dict[object, Tensor | None] = {}
    for direction, parameters in enumerate(weights):
        for name, weight in zip(Weights._fields, parameters, strict=True):
            if weight is not None and name == "weight_hr" and forward:
                weight = weight.T
            if weight is not None and (weight.dtype != compute or not weight.is_contiguous()):
                weight = weight.detach().to(compute).contiguous()
            named[name, direction] = weight
    return named


@process.one_torch_thread
def forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    rows: Rows,
    *,
    reset: Tensor | None = None,
    save: bool = False,
    cells: bool = False,
) -> Forward:
    """See the contract."""
    x, h_0, c_0, flags = _rows_dense(input), _rows_dense(h_0), _rows_dense(c_0), _flags(reset)
    kind, kernels, count = Kind.of(x, weights, rows), kernels_of(x.dtype), len(weights)
    output = rows.new(x, count * kind.width)
    h_n, c_n = x.new_empty((count, kind.batch, kind.width)), x.new_empty((count, kind.batch, kind.hidden))
    padded = kernels.block.padded(kind.hidden)
    kept = [buffers.take(rows.room * padded, kernels.compute) for _ in range(count * (save or cells))]
    gates = [buffers.take(rows.room * 4 * padded, x.dtype) for _ in range(count * save)]
    available = threads.available(kind.threads(rows.total))
    given = _ForwardGiven(
        _strides(x), _strides(output), _strides(flags), _strides(h_0), _strides(c_0), save, bool(kept)
    )
    drawing = _drawn(_draw_forward, kind, rows, available, given)
    tensors: dict[object, Any] = {
        "x": x, "y": output, "reset": flags, "h_0": h_0, "c_0": c_0, "h_n": h_n, "c_n": c_n,
        **_parameters(weights, kernels.compute, forward=True),
        **_by_direction("gates", gates), **_by_direction("cells", kept),
    }  # fmt: skip
    drawing.run(kernels.forward(), tensors)
    return Forward(
        output, h_n, c_n, _cells_out(rows, kind, padded, kept, output) if cells else None,
        (*gates, *kept) if save else (),
    )  # fmt: skip


def _by_direction(name: str, each: Iterable[Any]) -> dict[object, Any]:
    return {(name, direction): one for direction, one in enumerate(each)}


class _ForwardGiven(NamedTuple):
    """What else a forward's arguments depend on."""

    x: Strides
    y: Strides
    reset: Strides
    h_0: Strides
    c_0: Strides
    save: bool
    cells: bool


class _BackwardGiven(NamedTuple):
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


def _drawn(draw: Callable[..., _Drawing], kind: Kind, rows: Rows, available: int, given: NamedTuple) -> _Drawing:
    """The drawing of this kind of call: that of the last one where all rows are alive at every step."""
    alive = Alive.of(rows)
    return draw(Problem(kind, alive, available), given) if alive else _drawn_once(draw, kind, available, given)


@functools.lru_cache(maxsize=512)
def _drawn_once(draw: Callable[..., _Drawing], kind: Kind, available: int, given: NamedTuple) -> _Drawing:
    return draw(Problem(kind, None, available), given)


def _draw_forward(problem: Problem, given: _ForwardGiven) -> _Drawing:
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
    stored = p.kind.dtype.itemsize
    before, after, records = _Jobs(p), _Jobs(p), list[np.ndarray]()
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
    return _Drawing(p, before, records, after, plan.members)


def _forward_scratch(p: Problem, plan: tiling.Plan, borders: list[int], fused: bool, save: bool) -> dict[str, int]:
    """The scratch of one direction; see ``ForwardArgs``."""
    size, staged, chunk_rows, gate_bytes = p.size, p.kernels.staged, plan.chunk * p.batch, 4 * p.padded_hidden * p.size
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


def _flat_index(rows: Rows) -> Tensor | None:
    """Where row n of the internal order lies in a padded tensor flattened to (T * B, ·); None: at n."""
    if rows.batch_sizes is None or rows.packed:
        return None
    t, r = (torch.arange(rows.batch, device="cpu") < rows.batch_sizes[:, None]).nonzero(as_tuple=True)
    return t * rows.batch + (r if rows.order is None else rows.order[r])


def _cells_out(rows: Rows, kind: Kind, padded: int, kept: list[Tensor], like: Tensor) -> Tensor:
    """Every c_t, from the internal order into a new tensor of the user's rows."""
    hidden, index = kind.hidden, _flat_index(rows)
    cells = rows.new(like, len(kept) * hidden, kept[0].dtype)
    for direction, internal in enumerate(kept):
        values = internal.view(-1, padded)[: rows.total, :hidden]
        target = cells[..., direction * hidden : (direction + 1) * hidden]
        if index is not None:
            target[index // rows.batch, index % rows.batch] = values
        else:
            target.copy_(values.view(*rows.shape, hidden) if rows.packed else values.unflatten(0, rows.shape))
    return cells


def _cells_in(rows: Rows, kind: Kind, padded: int, grad_cells: Tensor, compute: torch.dtype) -> list[Tensor]:
    """The gradients of every c_t in the internal order, (N, H') for each direction."""
    hidden, index, result = kind.hidden, _flat_index(rows), []
    for direction in range(kind.directions):
        values = grad_cells[..., direction * hidden : (direction + 1) * hidden]
        if index is not None:
            values = values[index // rows.batch, index % rows.batch]
        internal = torch.zeros((rows.total, padded), dtype=compute, device="cpu")
        internal[:, :hidden] = values.reshape(rows.total, hidden)
        result.append(internal)
    return result


@process.one_torch_thread
def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    *,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    output: Tensor,
    saved: tuple[Tensor, ...],
    rows: Rows,
    reset: Tensor | None = None,
    needs: Needs = Needs(),  # noqa: B008 (immutable)
    norms: bool = False,
    gate_rows: int = 0,
) -> Gradients:
    """See the contract."""
    x, y, dy, h_0, c_0, dh_n, dc_n = map(_rows_dense, (input, output, grad_output, h_0, c_0, grad_h_n, grad_c_n))
    kind, kernels, count, flags = Kind.of(x, weights, rows), kernels_of(x.dtype), len(weights), _flags(reset)
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have brought them
    padded = kernels.block.padded(kind.hidden)
    dx = [rows.new(x, kind.inputs) for _ in range(count * needs.input)]
    grad_h = x.new_empty((count, kind.batch, kind.width)) if needs.h_0 else None
    grad_c = x.new_empty((count, kind.batch, kind.hidden)) if needs.c_0 else None
    squares = [_no_squares(kind, kernels.block) for _ in range(count * norms)]
    dcells = [] if grad_cells is None else _cells_in(rows, kind, padded, grad_cells, kernels.compute)
    available = threads.available(kind.threads(rows.total))
    given = _BackwardGiven(
        _strides(x), _strides(y), _strides(flags), _strides(h_0), _strides(c_0), _strides(dx[0] if dx else None),
        _strides(dy), _strides(dh_n), _strides(dc_n), bool(dcells), needs, norms,
    )  # fmt: skip
    drawing = _drawn(_draw_backward, kind, rows, available, given)
    gradients = [_new_gradients(parameters, kernels.compute, needs) for parameters in weights]
    tensors: dict[object, Any] = {
        "x": x, "y": y, "dy": dy, "reset": flags, "h_0": h_0, "c_0": c_0, "dh_n": dh_n, "dc_n": dc_n,
        "grad_h": grad_h, "grad_c": grad_c, **_parameters(weights, kernels.compute, forward=False),
        **_by_direction("gates", saved[:count]), **_by_direction("cells", saved[count:]),
        **_by_direction("dx", dx), **_by_direction("norms", squares), **_by_direction("dcells", dcells),
        **{(f"grad of {name}", d): g for d, each in enumerate(gradients) for name, g in each._asdict().items()},
    }  # fmt: skip
    drawing.run(kernels.backward(), tensors)
    if len(dx) == 2:
        dx[0] += dx[1]
    return Gradients(
        dx[0] if dx else None,
        grad_h,
        grad_c,
        tuple(_as_given(each, parameters) for each, parameters in zip(gradients, weights, strict=True)),
        _magnitudes(rows, kernels, squares) if norms else None,
        _gate_statistics(rows, kind, kernels, saved[:count], gate_rows) if gate_rows else None,
    )


def _new_gradients(parameters: Weights, compute: torch.dtype, needs: Needs) -> WeightGradients:
    """Tensors for the weight gradients in the compute dtype."""
    if not needs.weights:
        return WeightGradients()
    shapes = [None if w is None else w.shape for w in parameters]
    if shapes[-1] is not None:
        shapes[-1] = shapes[-1][::-1]  # weight_hr's comes transposed
    return WeightGradients(*(None if s is None else torch.empty(s, dtype=compute, device="cpu") for s in shapes))


def _draw_backward(problem: Problem, given: _BackwardGiven) -> _Drawing:
    p, at, needs, stored = problem, problem.buffers.at, given.needs, problem.kind.dtype.itemsize
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
    before, after, records = _Jobs(p), _Jobs(p), list[np.ndarray]()
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
                part_begin=first, part_end=last, part_starts=starts,
            )  # fmt: skip
            records.append(p.records(arguments, plan, share, index * plan.row_groups))
    return _Drawing(p, before, records, after, plan.members)


def _backward_jobs(
    p: Problem, given: _BackwardGiven, scratch: dict[str, int], borders: list[int], direction: int,
    before: _Jobs, after: _Jobs,
) -> None:  # fmt: skip
    """What becomes of the states and weights of one direction."""
    needs, stored = given.needs, p.kind.dtype.itemsize
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


def _unpack_gradients(p: Problem, after: _Jobs, sums: dict[str, int], parts: int, stride: int, direction: int) -> None:
    """The weight gradients of one direction, from the sums of its parts, the first at ``sums``."""

    def of(name: str) -> object:
        return f"grad of {name}", direction

    after.unpack_gates(of("weight_ih"), sums["dw_x"], p.inputs, parts, stride)
    after.unpack_gates(of("weight_hh"), sums["dw_h"], p.width, parts, stride)
    if p.kind.bias:
        after.unpack_gates(of("bias_ih"), sums["db"], 1, parts, stride)
        after.unpack_gates(of("bias_hh"), sums["db"], 1, 1, 0)  # by now the sum of all parts
    if p.projected:
        after.unpack_columns(of("weight_hr"), sums["dw_r"], p.hidden, p.width, parts, stride)


def _backward_scratch(p: Problem, borders: list[int], needs: Needs) -> dict[str, int]:
    """What the parts of one direction share; see ``BackwardArgs``."""
    size, lanes, gates = p.size, p.block.lanes, 4 * p.padded_hidden
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
    gates = 4 * p.padded_hidden * p.size * needs.weights
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
        dz=row * 4 * p.padded_hidden,
        dh_chunk=row * p.columns * p.block.panel * p.projected,
        x_strips=row * p.inputs * needs.weights,
        h_strips=row * p.width * needs.weights,
        m_strips=row * p.hidden * p.projected * needs.weights,
        dx_stage=row * p.inputs * p.kernels.staged,
        table=chunk_rows * 8,
    )


def _as_given(gradients: WeightGradients, parameters: Weights) -> WeightGradients:
    """``gradients`` in the shapes and the dtypes of the weights."""
    pairs = zip(gradients, parameters, strict=True)
    found = WeightGradients(*(g if g is None or w is None else g.to(w.dtype) for g, w in pairs))
    return found if found.weight_hr is None else found._replace(weight_hr=found.weight_hr.T)


def _no_squares(kind: Kind, block: tiling.Block) -> np.ndarray:
    """Zeros for the sums of squares of one direction, (2, T * B, ·); rows that have ended stay so."""
    blocks = ceil_div(ceil_div(max(kind.hidden, kind.width), block.lanes), NORM_PANELS)
    rows = kind.steps * kind.batch
    squares = buffers.take(2 * rows * blocks, torch.float64).numpy().reshape(2, rows, blocks)
    squares.fill(0)  # NumPy's: torch's would wait for ever in a forked child
    return squares


def _magnitudes(rows: Rows, kernels: Any, squares: list[np.ndarray]) -> Tensor:
    """(2, D, T, B) norms from the partial sums of squares (2, T * B, ·) of each direction."""
    each = torch.empty((len(squares), 2, rows.steps * rows.batch), dtype=kernels.compute, device="cpu")
    kernel = kernels.norms()
    for direction, of_direction in enumerate(squares):
        kernel(each[direction].numpy(), of_direction)
    norms = each.view(len(squares), 2, rows.steps, rows.batch).transpose(0, 1)
    if rows.order is None:
        return norms
    return torch.empty_like(norms).index_copy_(-1, rows.order, norms)


def _gate_statistics(rows: Rows, kind: Kind, kernels: Any, gates: tuple[Tensor, ...], wanted: int) -> GateStatistics:
    sizes = None if rows.batch_sizes is None else np.ascontiguousarray(rows.batch_sizes.numpy(), np.int64)
    starting = rows.batch if sizes is None else int(sizes[0])
    starts = None if sizes is None else starts_of(sizes)
    return statistics(
        kernels.statistics(), gates, np.array(sampled_rows(starting, wanted)), sizes, starts,
        rows.steps, rows.batch, kind.hidden, kernels.block.lanes,
    )  # fmt: skip
