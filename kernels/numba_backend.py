"""The Numba backend of the contract: host code, from tensors to launches and back.

Everything that needs memory or a decision is here; the arithmetic is in ``numba_lstm.py``.  A call asks
``tiling.plan`` how to share the work, lays out scratch, and works off three launches: jobs that pack the weights and
read the states, one launch a direction and part of the batch, side by side where threads allow, and jobs that write
what is left (``numba_jobs.py``).

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import buffers, process, threads, tiling
from .contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, WeightGradients, Weights
from .gate_statistics import sampled_rows
from .numba_flow import statistics
from .numba_jobs import (
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
from .numba_lstm import JOINED_ROWS, NORM_PANELS, BackwardArgs, ForwardArgs
from .numba_problem import DTYPES, SHARE, Problem, Scratch, Table, launch, multiples, variant_of
from .tiling import ceil_div


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells."""
    variant = variant_of(layer.dtype)
    padded = ceil_div(layer.hidden_size, variant.block.lanes) * variant.block.lanes
    sizes = ((4 * padded, layer.dtype), (padded, variant.compute))
    return [((room * width,), dtype) for width, dtype in sizes for _ in range(layer.directions)]


def prewarm(layer: Layer, *, training: bool) -> None:
    """Compiles, or loads from the disk cache, the kernels that ``layer`` will use."""
    variant = variant_of(layer.dtype)
    variant.jobs()
    variant.forward()
    if training:
        variant.backward()
    threads.prewarm()


class _Jobs:
    """The jobs before a call's launches, or after them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.jobs, self.values = problem, list[Job](), 0
        self.kept: list[object] = []  # whose addresses they hold

    def run(self) -> None:
        run(self.problem.variant.jobs(), self.jobs, self.problem.available, self.values)

    def _matrix(self, weight: Tensor) -> int:
        """The address of ``weight`` in the compute dtype, its rows one behind another."""
        if weight.dtype != self.problem.variant.compute or not weight.is_contiguous():
            weight = weight.detach().to(self.problem.variant.compute).contiguous()
            self.kept.append(weight)
        self.values += weight.numel()
        return weight.data_ptr()

    def pack_gates(self, packed: int, weight: Tensor) -> None:
        """(4H, K) into gate panels."""
        p = self.problem
        self.jobs.append(Job(PACK_GATES, p.panels, packed, self._matrix(weight), weight.shape[1], p.hidden))

    def pack_bias(self, packed: int, bias_ih: Tensor | None, bias_hh: Tensor | None) -> None:
        """(4H,) each into the gate panels of their sum; zeros where there are none."""
        one, other = (0 if bias is None else self._matrix(bias) for bias in (bias_ih, bias_hh))
        self.jobs.append(Job(PACK_BIAS, self.problem.panels, packed, one, 1, self.problem.hidden, other=other))

    def pack_columns(self, packed: int, weight: Tensor, order: Table) -> None:
        """(·, columns) into column panels, its rows in that order."""
        columns, depth = weight.shape[1], len(order.values)
        panels = ceil_div(columns, self.problem.block.panel)
        self.jobs.append(Job(PACK_COLUMNS, panels, packed, self._matrix(weight), depth, columns, order.address))

    def unpack_gates(self, like: Tensor, packed: int, parts: int = 1, stride: int = 0) -> Tensor:
        """A tensor in the shape of ``like``, (4H, K) or (4H,), for what gate panels will hold."""
        p = self.problem
        result = torch.empty(like.shape, dtype=p.variant.compute)
        depth = like.shape[1] if like.dim() == 2 else 1
        self.jobs.append(
            Job(UNPACK_GATES, p.panels, result.data_ptr(), packed, depth, p.hidden, parts=parts, part_stride=stride)
        )
        self.values += parts * result.numel()
        return result

    def unpack_columns(self, depth: int, columns: int, packed: int, parts: int, stride: int) -> Tensor:
        """A tensor (depth, columns) for what whole column panels will hold."""
        result = torch.empty((depth, columns), dtype=self.problem.variant.compute)
        panels = ceil_div(columns, self.problem.block.panel)
        self.jobs.append(
            Job(UNPACK_COLUMNS, panels, result.data_ptr(), packed, depth, columns, parts=parts, part_stride=stride)
        )
        self.values += parts * result.numel()
        return result

    def rows_in(self, target: int, rows: Table, state: Tensor | None, direction: int, columns: int) -> None:
        """A user's state (D, B, columns), or zeros, to rows of whole vectors in sorted order."""
        source, source_rows = 0, rows
        if state is not None:
            source, source_rows = self._state(state, direction)
        self.jobs.append(
            Job(
                ROWS_IN, self.problem.batch, target, source, columns=columns,
                target_rows=rows.address, source_rows=source_rows.address,
            )
        )  # fmt: skip

    def rows_out(self, source: int, rows: Table, state: Tensor, direction: int) -> None:
        """Rows in sorted order to a user's state (D, B, columns)."""
        target, target_rows = self._state(state, direction)
        self.jobs.append(
            Job(
                ROWS_OUT, self.problem.batch, target, source, columns=state.shape[2],
                target_rows=target_rows.address, source_rows=rows.address,
            )
        )  # fmt: skip

    def clear(self, target: int, values: int) -> None:
        self.jobs.append(Job(ROWS_IN, 1, target, 0, columns=values, target_rows=multiples(1, 1).address))

    def _state(self, state: Tensor, direction: int) -> tuple[int, Table]:
        if state.stride(2) != 1:
            state = state.contiguous()
            self.kept.append(state)
        of_direction, of_row, _ = state.stride()
        address = state.data_ptr() + direction * of_direction * state.itemsize
        return address, self.problem.offsets(of_row * state.itemsize)


def _rows_dense(tensor: Tensor) -> Tensor:
    """``tensor``, its last dimension without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
    x = _rows_dense(input)
    problem = Problem(x, weights, rows, reset)
    batch, hidden, width, count = problem.batch, problem.hidden, problem.width, problem.directions
    compute, kernel = problem.variant.compute, problem.variant.forward()
    output = rows.new(x, count * width)
    h_n, c_n = x.new_empty((count, batch, width)), x.new_empty((count, batch, hidden))
    kept = [buffers.take(rows.room * problem.padded_hidden, compute) for _ in range(count * (save or cells))]
    gates = [buffers.take(rows.room * 4 * problem.padded_hidden, x.dtype) for _ in range(count * save)]

    problem.available = available = threads.available(problem.threads)
    plan = tiling.plan(
        problem.steps, batch, hidden, width, problem.inputs, problem.block, problem.size, max(1, available // count)
    )
    borders = problem.row_groups(plan, 0, batch)
    h_half = problem.state_bytes(problem.padded_width, borders)
    h_rows = problem.state_rows(problem.padded_width, borders)
    c_rows = problem.state_rows(problem.padded_hidden, borders)
    shared = problem.shape | problem.geometry("x", x) | problem.geometry("y", output)
    shared |= problem.geometry("reset", problem.reset) | {
        "x": x.data_ptr(), "chunk": plan.chunk, "chunk_rows": plan.chunk * batch, "h_half": h_half,
        "fused": int(_fused(problem, plan)), "reset": 0 if problem.reset is None else problem.reset.data_ptr(),
        **dict.fromkeys((*SHARE, "counter"), 0),
    }  # fmt: skip
    before, after, launches, owners = _Jobs(problem), _Jobs(problem), [], []
    for direction, parameters in enumerate(weights):
        scratch = _forward_scratch(problem, plan, borders, save)
        owners.append(scratch)
        at = scratch.at
        for half in (0, h_half):
            before.rows_in(at["h"] + half, h_rows, h_0, direction, width)
        before.rows_in(at["c"], c_rows, c_0, direction, hidden)
        before.pack_gates(at["w_x"], parameters.weight_ih)
        before.pack_gates(at["w_h"], parameters.weight_hh)
        before.pack_bias(at["bias"], parameters.bias_ih, parameters.bias_hh)
        if parameters.weight_hr is not None:
            before.pack_columns(at["w_r"], parameters.weight_hr.detach().T, multiples(hidden, 1))
        arguments = ForwardArgs(
            **shared, **at, reverse=direction, y=output.data_ptr() + direction * width * output.itemsize,
            gates=gates[direction].data_ptr() if save else 0, cells=kept[direction].data_ptr() if kept else 0,
        )  # fmt: skip
        launches.append(problem.records(arguments, plan, borders))
        after.rows_out(at["c"], c_rows, c_n, direction)
        after.rows_out(*problem.last_rows(at["h"], h_rows, h_half, direction), h_n, direction)
    before.run()
    launch(kernel, launches, available)
    after.run()
    return Forward(
        output, h_n, c_n, _cells_out(problem, kept, output) if cells else None, (*gates, *kept) if save else ()
    )


def _fused(problem: Problem, plan: tiling.Plan) -> bool:
    return plan.fused and not problem.variant.staged


def _forward_scratch(problem: Problem, plan: tiling.Plan, borders: list[int], save: bool) -> Scratch:
    """The scratch of one direction; see ``ForwardArgs``."""
    size, staged, projected = problem.size, problem.variant.staged, problem.projected
    fused, chunk_rows, gate_bytes = _fused(problem, plan), plan.chunk * problem.batch, 4 * problem.padded_hidden * size
    state = problem.state_bytes(problem.padded_hidden, borders)
    return Scratch(
        h=2 * problem.state_bytes(problem.padded_width, borders),
        c=state,
        m=state * projected,
        z=chunk_rows * gate_bytes * (not fused and (not save or staged)),
        x_stage=plan.members * chunk_rows * problem.inputs * size * staged,
        table=plan.members * 2 * chunk_rows * 8 * (not fused),
        w_x=gate_bytes * problem.inputs,
        w_h=gate_bytes * problem.width,
        w_r=column_panels_size(problem.hidden, problem.width, problem.block.lanes) * size * projected,
        bias=gate_bytes,
    )


def _cells_out(problem: Problem, kept: list[Tensor], like: Tensor) -> Tensor:
    """Every c_t, from the internal order into a new tensor of the user's rows."""
    hidden = problem.hidden
    cells = problem.rows.new(like, len(kept) * hidden, problem.variant.compute)
    for direction, internal in enumerate(kept):
        values = internal.view(-1, problem.padded_hidden)[: problem.total, :hidden]
        target = cells[..., direction * hidden : (direction + 1) * hidden]
        if problem.flat_index is None:
            target.copy_(
                values.view(*problem.rows.shape, hidden)
                if problem.rows.packed
                else values.unflatten(0, problem.rows.shape)
            )
        else:
            target[problem.flat_index // problem.batch, problem.flat_index % problem.batch] = values
    return cells


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
    x, y = _rows_dense(input), _rows_dense(output)
    dy = None if grad_output is None else _rows_dense(grad_output)
    problem = Problem(x, weights, rows, reset)
    batch, hidden, width, count = problem.batch, problem.hidden, problem.width, problem.directions
    size, kernel = problem.size, problem.variant.backward()
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have brought them
    gates, kept = saved[:count], saved[count:]

    grad_input = [rows.new(x, problem.inputs) for _ in range(count * needs.input)]
    grad_h = x.new_empty((count, batch, width)) if needs.h_0 else None
    grad_c = x.new_empty((count, batch, hidden)) if needs.c_0 else None
    squares = [_no_squares(problem) for _ in range(count * norms)]
    grad_cells_in = [] if grad_cells is None else _cells_in(problem, grad_cells)

    problem.available = available = threads.available(problem.threads)
    parts = problem.parts()
    share_of = max(1, available // (count * len(parts)))
    most = max(last - first for first, last, _ in parts)
    plan = tiling.plan(problem.steps, most, hidden, width, problem.inputs, problem.block, size, share_of, backward=True)
    shares = [problem.row_groups(plan, first, last) for first, last, _ in parts]
    borders = [0, *(last for share in shares for last in share[1:])]
    dh_rows = problem.state_rows(problem.padded_width, borders)
    dc_rows = problem.state_rows(problem.padded_hidden, borders)
    dx = grad_input[0] if needs.input else None
    shared = problem.shape | problem.geometry("x", x) | problem.geometry("y", y) | problem.geometry("dx", dx)
    shared |= problem.geometry("dy", dy) | problem.geometry("reset", problem.reset) | {
        "x": x.data_ptr(), "chunk": plan.chunk, "chunk_rows": plan.chunk * most,
        "reset": 0 if problem.reset is None else problem.reset.data_ptr(),
        "panel_rows": multiples(max(batch, JOINED_ROWS), problem.block.panel * size).address,
        **dict.fromkeys((*SHARE, "counter"), 0),
    }  # fmt: skip
    order = problem.table(gate_order(hidden, problem.block.lanes))
    before, after, launches, gradients, owners = _Jobs(problem), _Jobs(problem), [], [], []
    for direction, parameters in enumerate(weights):
        scratch = _backward_scratch(problem, borders, needs)
        at = scratch.at
        before.clear(at["zero"], max(problem.padded_hidden, problem.padded_width))
        before.rows_in(at["dh"], dh_rows, grad_h_n, direction, width)
        before.rows_in(at["dc"], dc_rows, grad_c_n, direction, hidden)
        before.rows_in(at["h_0"], multiples(batch, problem.padded_width * size), h_0, direction, width)
        before.rows_in(at["c_0"], multiples(batch, problem.padded_hidden * size), c_0, direction, hidden)
        before.pack_columns(at["w_h"], parameters.weight_hh, order)
        if needs.input:
            before.pack_columns(at["w_x"], parameters.weight_ih, order)
        if parameters.weight_hr is not None:
            before.pack_columns(at["w_r"], parameters.weight_hr, multiples(width, 1))
        whole = shared | at | {
            "dx": grad_input[direction].data_ptr() if needs.input else 0,
            "norms": squares[direction].ctypes.data if norms else 0,
            "dy": 0 if dy is None else dy.data_ptr() + direction * width * dy.itemsize,
            "dcells": grad_cells_in[direction].data_ptr() if grad_cells_in else 0,
            "gates": gates[direction].data_ptr(), "cells": kept[direction].data_ptr(),
            "y": y.data_ptr() + direction * width * y.itemsize, "reverse": direction,
        }  # fmt: skip
        sums, part_stride = _gradient_scratch(problem, len(parts), needs)
        owners += [scratch, sums]
        groups_before = 0
        for index, ((first, last, starts), share) in enumerate(zip(parts, shares, strict=True)):
            own = _part_scratch(problem, plan.chunk * most, needs)
            owners.append(own)
            arguments = BackwardArgs(
                **whole, **own.at, part_begin=first, part_end=last, part_starts=starts,
                **{name: address and address + index * part_stride for name, address in sums.at.items()},
            )  # fmt: skip
            launches.append(problem.records(arguments, plan, share, groups_before))
            groups_before += plan.row_groups
        gradients.append(_weight_gradients(after, parameters, sums.at, len(parts), part_stride, needs))
        if grad_h is not None:
            after.rows_out(at["dh"], dh_rows, grad_h, direction)
        if grad_c is not None:
            after.rows_out(at["dc"], dc_rows, grad_c, direction)
    before.run()
    launch(kernel, launches, available)
    after.run()
    if needs.input and count == 2:
        grad_input[0] += grad_input[1]
    return Gradients(
        grad_input[0] if needs.input else None,
        grad_h,
        grad_c,
        tuple(_as_given(each, parameters) for each, parameters in zip(gradients, weights, strict=True)),
        _magnitudes(problem, squares) if norms else None,
        _gate_statistics(problem, gates, gate_rows) if gate_rows else None,
    )


def _backward_scratch(problem: Problem, borders: list[int], needs: Needs) -> Scratch:
    """What the parts of one direction share; see ``BackwardArgs``."""
    size, lanes, gates = problem.size, problem.block.lanes, 4 * problem.padded_hidden
    state = problem.state_bytes(problem.padded_hidden, borders)
    return Scratch(
        zero=max(problem.padded_hidden, problem.padded_width) * size,
        dh=problem.state_bytes(problem.padded_width, borders),
        dc=state,
        h_0=problem.batch * problem.padded_width * size,
        c_0=problem.batch * problem.padded_hidden * size,
        dm=state * problem.projected,
        w_h=column_panels_size(gates, problem.width, lanes) * size,
        w_x=column_panels_size(gates, problem.inputs, lanes) * size * needs.input,
        w_r=column_panels_size(problem.width, problem.hidden, lanes) * size * problem.projected,
    )


def _gradient_scratch(problem: Problem, parts: int, needs: Needs) -> tuple[Scratch, int]:
    """The packed weight gradients of one direction's parts, and how many bytes lie between those of two parts.

    The addresses are those of the first part.
    """
    gates = 4 * problem.padded_hidden * problem.size * needs.weights
    columns = problem.columns * problem.hidden * problem.block.panel * problem.size * needs.weights
    sizes = {
        "dw_x": gates * problem.inputs, "dw_h": gates * problem.width, "db": gates, "dw_r": columns * problem.projected,
    }  # fmt: skip
    stride = sum(ceil_div(each, buffers.ALIGN) * buffers.ALIGN for each in sizes.values())
    scratch = Scratch(**sizes, others=(parts - 1) * stride)
    del scratch.at["others"]
    return scratch, stride


def _part_scratch(problem: Problem, chunk_rows: int, needs: Needs) -> Scratch:
    """What a part of the batch has for itself; see ``BackwardArgs``."""
    row, projected = chunk_rows * problem.size, problem.projected
    return Scratch(
        dz=row * 4 * problem.padded_hidden,
        dh_chunk=row * problem.columns * problem.block.panel * projected,
        x_strips=row * problem.inputs * needs.weights,
        h_strips=row * problem.width * needs.weights,
        m_strips=row * problem.hidden * projected * needs.weights,
        dx_stage=row * problem.inputs * problem.variant.staged,
        table=chunk_rows * 8,
    )


def _weight_gradients(
    after: _Jobs, parameters: Weights, sums: dict[str, int], parts: int, stride: int, needs: Needs
) -> WeightGradients:
    """Tensors in the compute dtype, which the jobs will fill from the ``parts`` sums, the first at ``sums``."""
    if not needs.weights:
        return WeightGradients()
    bias_ih = bias_hh = weight_hr = None
    if parameters.bias_ih is not None:
        bias_ih = after.unpack_gates(parameters.bias_ih, sums["db"], parts, stride)
        bias_hh = after.unpack_gates(parameters.bias_ih, sums["db"])  # by then the sum of all parts
    if parameters.weight_hr is not None:
        width, hidden = parameters.weight_hr.shape
        weight_hr = after.unpack_columns(hidden, width, sums["dw_r"], parts, stride).T
    return WeightGradients(
        after.unpack_gates(parameters.weight_ih, sums["dw_x"], parts, stride),
        after.unpack_gates(parameters.weight_hh, sums["dw_h"], parts, stride),
        bias_ih,
        bias_hh,
        weight_hr,
    )


def _as_given(gradients: WeightGradients, parameters: Weights) -> WeightGradients:
    """``gradients`` in the dtypes of the weights."""
    pairs = zip(gradients, parameters, strict=True)
    return WeightGradients(*(g if g is None or w is None else g.to(w.dtype) for g, w in pairs))


def _no_squares(problem: Problem) -> np.ndarray:
    """Zeros for the sums of squares of one direction, (2, T * B, ·); rows that have ended stay so."""
    blocks = ceil_div(max(problem.padded_hidden, problem.padded_width), NORM_PANELS * problem.block.lanes)
    rows = problem.steps * problem.batch
    squares = buffers.take(2 * rows * blocks, torch.float64).numpy().reshape(2, rows, blocks)
    squares.fill(0)  # NumPy's: torch's would wait for ever in a forked child
    return squares


def _magnitudes(problem: Problem, squares: list[np.ndarray]) -> Tensor:
    """(2, D, T, B) norms from the partial sums of squares (2, T * B, ·) of each direction."""
    rows = problem.steps * problem.batch
    each = torch.empty((len(squares), 2, rows), dtype=problem.variant.compute)
    kernel = problem.variant.norms()
    for direction, of_direction in enumerate(squares):
        kernel(each[direction].numpy(), of_direction)
    norms = each.view(len(squares), 2, problem.steps, problem.batch).transpose(0, 1)
    if problem.rows.order is None:
        return norms
    return torch.empty_like(norms).index_copy_(-1, problem.rows.order, norms)


def _gate_statistics(problem: Problem, gates: tuple[Tensor, ...], wanted: int) -> GateStatistics:
    starting = problem.batch if problem.batch_sizes is None else int(problem.batch_sizes[0])
    return statistics(
        problem.variant.statistics(), gates, np.array(sampled_rows(starting, wanted)), problem.batch_sizes,
        problem.row_starts, problem.steps, problem.batch, problem.hidden, problem.block.lanes,
    )  # fmt: skip


def _cells_in(problem: Problem, grad_cells: Tensor) -> list[Tensor]:
    """The gradients of every c_t in the internal order, (N, H') for each direction."""
    hidden, result = problem.hidden, []
    for direction in range(problem.directions):
        values = grad_cells[..., direction * hidden : (direction + 1) * hidden]
        if problem.flat_index is not None:
            values = values[problem.flat_index // problem.batch, problem.flat_index % problem.batch]
        padded = torch.zeros((problem.total, problem.padded_hidden), dtype=problem.variant.compute)
        padded[:, :hidden] = values.reshape(problem.total, hidden)
        result.append(padded)
    return result
