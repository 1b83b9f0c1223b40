"""The Numba backend of the contract: host code, from tensors to launches and back.

Everything that needs memory or a decision is here; the arithmetic is in ``numba_lstm.py``.  A call asks
``tiling.plan`` how to share the work, packs the weights, lays out scratch (``buffers.py``), and runs one launch a
direction on the thread pool; with two directions and more than one thread the launches run side by side.

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from . import buffers, process, threads, tiling
from .contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, WeightGradients, Weights, state_dtype
from .gate_statistics import sampled_rows
from .numba_flow import norms_kernel, statistics, statistics_kernel
from .numba_lstm import JOINED_ROWS, NORM_PANELS, BackwardArgs, ForwardArgs, backward_kernel, forward_kernel
from .numba_pack import PackArgs, SumArgs, column_panels_size, gate_order, packers, share
from .tiling import ceil_div

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells."""
    variant = _variant(layer.dtype)
    padded = ceil_div(layer.hidden_size, variant.block.lanes) * variant.block.lanes
    sizes = ((4 * padded, layer.dtype), (padded, variant.compute))
    return [((room * width,), dtype) for width, dtype in sizes for _ in range(layer.directions)]


# Bytes between the state rows of different threads' groups: two pages, for a prefetcher follows its stream through a
# page and asks for the next.  Where they hold rows of another thread, it fetches what that is about to write: apart,
# inference gains 1.06 and the forward of training 1.02 to 1.2 at H = 16 and 64 (two threads); one page, half of that.
GAP = 8192


@functools.cache
def _variant(dtype: torch.dtype) -> SimpleNamespace:
    """What depends on the dtype alone: names, block shape, packers, compiled kernels."""
    isa = tiling.cpu_isa()
    compute = state_dtype(dtype)
    block = tiling.block_shape(isa, compute)
    scalar, storage = DTYPES[compute], DTYPES[dtype]
    key = (scalar, storage, block, isa == "avx512")
    return SimpleNamespace(
        compute=compute, size=compute.itemsize, block=block, pack=packers(scalar, block), staged=scalar != storage,
        forward=functools.partial(forward_kernel, *key), backward=functools.partial(backward_kernel, *key),
        statistics=functools.partial(statistics_kernel, *key[:3]), norms=functools.partial(norms_kernel, scalar),
    )  # fmt: skip


def prewarm(layer: Layer, *, training: bool) -> None:
    """Compiles, or loads from the disk cache, the kernels that ``layer`` will use."""
    variant = _variant(layer.dtype)
    variant.forward()
    if training:
        variant.backward()
    threads.prewarm()


@functools.lru_cache(maxsize=1024)
def _multiples(count: int, stride: int) -> np.ndarray:
    """0, stride, 2 stride, ...; not to be written."""
    return np.arange(count, dtype=np.int64) * stride


class _Problem:
    """The sizes, the row geometry and the plan of one call."""

    def __init__(self, input: Tensor, weights: tuple[Weights, ...], rows: Rows, reset: Tensor | None):
        first = weights[0]
        self.variant = variant = _variant(input.dtype)
        self.rows, self.block = rows, variant.block
        self.steps, self.batch, self.directions = rows.steps, rows.batch, len(weights)
        self.inputs = input.shape[-1]
        self.hidden = first.weight_hh.shape[0] // 4
        self.width = first.weight_hh.shape[1]
        self.projected = first.weight_hr is not None
        self.panels = ceil_div(self.hidden, self.block.lanes)
        self.padded_hidden = self.panels * self.block.lanes
        self.padded_width = ceil_div(self.width, self.block.lanes) * self.block.lanes
        self.columns = ceil_div(self.width, self.block.panel)
        self.total = rows.total
        sizes = rows.batch_sizes
        self.batch_sizes = None if sizes is None else np.ascontiguousarray(sizes.numpy(), np.int64)
        self.row_starts = None
        if self.batch_sizes is not None:
            self.row_starts = np.zeros(self.steps + 1, np.int64)
            np.cumsum(self.batch_sizes, out=self.row_starts[1:])
        self.order = None if rows.order is None else rows.order.numpy()
        self.index = _multiples(self.batch, 1)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        work = self.total * 4 * self.hidden * (self.inputs + self.width)
        self.threads = tiling.useful_threads(work * self.directions, threads.count())
        self.available = 1  # of those, when the work begins

    def geometry(self, tensor: Tensor) -> tuple[int, np.ndarray]:
        """(bytes from step to step, byte offset of each sorted row) of a user's tensor of these rows."""
        size, strides = tensor.itemsize, tensor.stride()
        stride = strides[0 if self.rows.packed else 1] * size
        if self.rows.packed or self.order is None:
            return strides[0] * size, _multiples(self.batch, stride)
        return strides[0] * size, self.order * stride

    def shape(self) -> dict[str, int]:
        """The arguments that both kernels share."""
        return {
            "steps": self.steps, "batch": self.batch, "inputs": self.inputs, "hidden": self.hidden, "width": self.width,
            "batch_sizes": 0 if self.batch_sizes is None else self.batch_sizes.ctypes.data,
            "row_starts": 0 if self.row_starts is None else self.row_starts.ctypes.data,
            "packed": int(self.rows.packed),
        }  # fmt: skip

    def state_bytes(self, columns: int, borders: list[int]) -> int:
        """Bytes of a state (B, columns) of whole vectors; a gap follows each of several row groups."""
        groups = len(borders) - 1
        return self.batch * columns * self.variant.size + groups * GAP * (groups > 1)

    def state_groups(self, owner: Tensor, address: int, columns: int, borders: list[int]) -> list[Tensor]:
        """The rows of each row group of a state (B, columns) at ``address`` of ``owner``."""
        size = self.variant.size
        return [
            _at(owner, address + group * GAP + first * columns * size, self.variant.compute, last - first, columns)
            for group, (first, last) in enumerate(itertools.pairwise(borders))
        ]

    def load_state(self, groups: list[Tensor], state: Tensor, direction: int) -> None:
        """Writes a user's state (D, B, ·) to row groups, in sorted order."""
        source = state[direction] if self.rows.order is None else state[direction][self.rows.order]
        for target, rows in zip(groups, source.split([len(group) for group in groups]), strict=True):
            target[:, : source.shape[1]] = rows

    def store_state(self, target: Tensor, source: Tensor) -> None:
        """Writes rows in sorted order to a user's state of one direction (B, ·)."""
        if self.rows.order is None:
            target.copy_(source[:, : target.shape[1]])
        else:
            target[self.rows.order] = source[:, : target.shape[1]].to(target.dtype)

    @functools.cached_property
    def flat_index(self) -> Tensor | None:
        """Where row n of the internal order lies in a padded tensor flattened to (T * B, ·); None: at n."""
        if self.rows.batch_sizes is None or self.rows.packed:
            return None
        t, r = (torch.arange(self.batch, device="cpu") < self.rows.batch_sizes[:, None]).nonzero(as_tuple=True)
        return t * self.batch + (r if self.rows.order is None else self.rows.order[r])

    def alive(self, first: int, last: int) -> np.ndarray | None:
        """Rows alive at each step among rows ``first`` to ``last``: (T,), or None where all are."""
        return None if self.batch_sizes is None else np.clip(self.batch_sizes - first, 0, last - first)

    def parts(self) -> list[tuple[int, int, np.ndarray | None]]:
        """The parts of the batch in backward: (first row, last row, rows of the part before each step or None)."""
        count = tiling.parts(
            self.batch, self.hidden, self.width, self.inputs, self.block, self.variant.size, self.directions
        )
        borders = tiling.balanced_rows(self.batch_sizes, self.batch, count)
        result = []
        for first, last in itertools.pairwise(borders):
            starts, alive = None, self.alive(first, last)
            if alive is not None:
                starts = np.zeros(self.steps + 1, np.int64)
                np.cumsum(alive, out=starts[1:])
            if last > first:
                result.append((first, last, starts))
        return result

    def row_groups(self, plan: tiling.Plan, first: int, last: int) -> list[int]:
        """The borders of the row groups of rows ``first`` to ``last``."""
        return [first + r for r in tiling.balanced_rows(self.alive(first, last), last - first, plan.row_groups)]

    def sharing(self, plan: tiling.Plan, rows: list[int], *, by_columns: bool):
        """(row group, ranges of rows, panels and column panels) of each member; ``rows``: borders of the row groups."""
        groups = plan.unit_groups
        columns = [self.columns * g // groups for g in range(groups + 1)]
        if by_columns:
            blocks = ceil_div(self.panels, 4)
            panels = [min(self.panels, 4 * (blocks * g // groups)) for g in range(groups + 1)]
        else:
            panels = [self.panels * g // groups for g in range(groups + 1)]
        for member in range(plan.members):
            row_group, unit_group = divmod(member, groups)
            yield row_group, {
                "row_begin": rows[row_group], "row_end": rows[row_group + 1],
                "panel_begin": panels[unit_group], "panel_end": panels[unit_group + 1],
                "column_begin": columns[unit_group], "column_end": columns[unit_group + 1],
                "lockstep": int(groups > 1), "member": member, "members": plan.members,
            }  # fmt: skip


def _at(owner: Tensor, address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """The part of ``owner`` (bytes) at ``address``, as a tensor of ``shape``."""
    begin = address - owner.data_ptr()
    return owner[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _launch(kernel, launches: list[list], count: int) -> None:
    """Runs ``launches``, each a list of its members' records: as many side by side as ``count`` threads allow."""
    counters = np.zeros((len(launches), 16), np.int64)  # on lines of their own
    base, line = counters.ctypes.data, counters.strides[0]
    records = [
        record._replace(counter=base + index * line) for index, launch in enumerate(launches) for record in launch
    ]
    members = len(launches[0])
    together = members * max(1, count // members)  # records; a launch is never cut: its members wait for one another
    for at in range(0, len(records), together):
        threads.run(kernel, records[at : at + together], counters)


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
    x = input if input.stride(-1) == 1 else input.contiguous()
    problem = _Problem(x, weights, rows, reset)
    variant, compute, size = problem.variant, problem.variant.compute, problem.variant.size
    batch, hidden, width, count = problem.batch, problem.hidden, problem.width, problem.directions
    output = rows.new(x, count * width)
    h_n, c_n = x.new_empty((count, batch, width)), x.new_empty((count, batch, hidden))
    kept = [buffers.take(rows.room * problem.padded_hidden, compute) for _ in range(count * (save or cells))]
    gates = [buffers.take(rows.room * 4 * problem.padded_hidden, x.dtype) for _ in range(count * save)]
    kernel = variant.forward()

    problem.available = available = threads.available(problem.threads)
    plan = tiling.plan(
        problem.steps, batch, hidden, width, problem.inputs, problem.block, size, max(1, available // count)
    )
    chunk, fused = plan.chunk, plan.fused and not variant.staged
    chunk_rows = chunk * batch
    x_step, x_rows = problem.geometry(x)
    y_step, y_rows = problem.geometry(output)
    reset_step, reset_rows = problem.geometry(problem.reset) if problem.reset is not None else (0, problem.index)
    h_rows, m_rows = _multiples(batch, problem.padded_width * size), _multiples(batch, problem.padded_hidden * size)
    shared = problem.shape() | {
        "x": x.data_ptr(), "chunk": chunk, "chunk_rows": chunk_rows, "fused": int(fused),
        "reset": 0 if problem.reset is None else problem.reset.data_ptr(),
        "x_step": x_step, "x_rows": x_rows.ctypes.data, "y_step": y_step, "y_rows": y_rows.ctypes.data,
        "reset_step": reset_step, "reset_rows": reset_rows.ctypes.data,
        "h_rows": h_rows.ctypes.data, "m_rows": m_rows.ctypes.data,
    }  # fmt: skip
    gate_size = 4 * problem.padded_hidden
    borders = problem.row_groups(plan, 0, batch)
    h_half, c_bytes = (problem.state_bytes(n, borders) for n in (problem.padded_width, problem.padded_hidden))
    shared["h_half"] = h_half
    owners, states, launches = [], [], []
    for direction, parameters in enumerate(weights):
        owner, (h, c, m, z, stage, table, w_x, w_h, w_r, bias) = buffers.carve(
            2 * h_half,
            c_bytes,
            c_bytes * problem.projected,
            chunk_rows * gate_size * size * (not fused and (not save or variant.staged)),
            plan.members * chunk_rows * problem.inputs * size * variant.staged,
            plan.members * 2 * chunk_rows * 8 * (not fused),
            gate_size * problem.inputs * size,
            gate_size * width * size,
            column_panels_size(hidden, width, problem.block.lanes) * size * problem.projected,
            gate_size * size,
        )
        # NumPy's fill: torch's would wake its thread pool, whose threads then spin on the cores of this launch
        # (and would hang in a forked child).
        owner.numpy()[: c + c_bytes - owner.data_ptr()].fill(0)
        h_states = [problem.state_groups(owner, at, problem.padded_width, borders) for at in (h, h + h_half)]
        c_state = problem.state_groups(owner, c, problem.padded_hidden, borders)
        if h_0 is not None:
            for h_state in h_states:
                problem.load_state(h_state, h_0, direction)
        if c_0 is not None:
            problem.load_state(c_state, c_0, direction)
        _pack_gates(problem, w_x, parameters.weight_ih)
        _pack_gates(problem, w_h, parameters.weight_hh)
        if parameters.bias_ih is None or parameters.bias_hh is None:
            _at(owner, bias, compute, gate_size).zero_()
        else:
            both = parameters.bias_ih.detach().to(compute) + parameters.bias_hh.detach().to(compute)
            _pack_gates(problem, bias, both[:, None])
        if parameters.weight_hr is not None:
            _pack_columns(problem, w_r, parameters.weight_hr.detach().T, _multiples(hidden, 1))
        owners.append(owner)
        states.append((h_states, c_state))
        base = shared | {
            "y": output.data_ptr() + direction * width * output.itemsize,
            "gates": gates[direction].data_ptr() if save else 0,
            "cells": kept[direction].data_ptr() if kept else 0,
            "z": z, "x_stage": stage, "table": table,
            "w_x": w_x, "w_h": w_h, "w_r": w_r, "bias": bias, "reverse": direction, "counter": 0,
        }  # fmt: skip
        launches.append([
            ForwardArgs(**base | _moved(group, h=h, c=c, m=m), **member)
            for group, member in problem.sharing(plan, borders, by_columns=False)
        ])  # fmt: skip
    _launch(kernel, launches, available)

    for direction, (h_states, c_state) in enumerate(states):
        problem.store_state(c_n[direction], _joined(c_state))
        even, odd = (_joined(h_state) for h_state in h_states)
        problem.store_state(h_n[direction], _last(problem, even, odd, direction))
    return Forward(
        output, h_n, c_n, _cells_out(problem, kept, output) if cells else None, (*gates, *kept) if save else ()
    )


def _joined(groups: list[Tensor]) -> Tensor:
    """The rows of all row groups of a state."""
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _moved(group: int, **states: int) -> dict[str, int]:
    """The addresses of states as the members of row group ``group`` see them: 0 stays 0."""
    return {name: address and address + group * GAP for name, address in states.items()}


def _last(problem: _Problem, even: Tensor, odd: Tensor, direction: int) -> Tensor:
    """Of both halves of h (B, P'), what each row wrote last: its steps alternate between them."""
    if problem.batch_sizes is None or direction == 1:
        return odd if problem.steps & 1 else even
    lengths = (problem.batch_sizes[:, None] > problem.index).sum(0)
    return torch.where(torch.from_numpy(lengths & 1)[:, None] == 1, odd, even)


def _matrix(problem: _Problem, weight: Tensor) -> Tensor:
    """``weight`` in the compute dtype, its rows one behind another."""
    if weight.dtype == problem.variant.compute and weight.is_contiguous():
        return weight
    return weight.detach().to(problem.variant.compute).contiguous()


def _pack_gates(problem: _Problem, packed: int, weight: Tensor) -> None:
    """Packs a (4H, K) weight into gate panels at ``packed``."""
    weight = _matrix(problem, weight)
    rows, depth = weight.shape
    record = PackArgs(packed, weight.data_ptr(), depth, rows // 4, 0)
    share(problem.variant.pack.pack_gates, problem.available, problem.panels, weight.numel(), record)


def _pack_columns(problem: _Problem, packed: int, weight: Tensor, rows: np.ndarray) -> None:
    """Packs a (·, columns) weight into column panels at ``packed``, its rows in the order ``rows``."""
    weight = _matrix(problem, weight)
    columns = weight.shape[1]
    record = PackArgs(packed, weight.data_ptr(), len(rows), columns, rows.ctypes.data)
    panels = ceil_div(columns, problem.block.panel)
    share(problem.variant.pack.pack_columns, problem.available, panels, weight.numel(), record)


def _unpack_gates(problem: _Problem, like: Tensor, packed: int) -> Tensor:
    """A gradient in the shape and dtype of ``like`` (4H, K) from gate panels at ``packed``."""
    result = torch.empty(like.shape, dtype=problem.variant.compute)
    rows, depth = like.shape
    record = PackArgs(packed, result.data_ptr(), depth, rows // 4, 0)
    share(problem.variant.pack.unpack_gates, problem.available, problem.panels, result.numel(), record)
    return result.to(like.dtype)


def _unpack_columns(problem: _Problem, like: Tensor, packed: int) -> Tensor:
    """A gradient in the shape and dtype of ``like`` (K, columns) from whole column panels at ``packed``."""
    result = torch.empty(like.shape, dtype=problem.variant.compute)
    depth, columns = like.shape
    record = PackArgs(packed, result.data_ptr(), depth, columns, 0)
    share(problem.variant.pack.unpack_columns, problem.available, problem.columns, result.numel(), record)
    return result.to(like.dtype)


def _cells_out(problem: _Problem, kept: list[Tensor], like: Tensor) -> Tensor:
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
    x = input if input.stride(-1) == 1 else input.contiguous()
    y = output if output.stride(-1) == 1 else output.contiguous()
    if grad_output is not None and grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    problem = _Problem(x, weights, rows, reset)
    variant, compute, size, block = problem.variant, problem.variant.compute, problem.variant.size, problem.block
    batch, hidden, width, inputs = problem.batch, problem.hidden, problem.width, problem.inputs
    count, steps = problem.directions, problem.steps
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have brought them
    gates, kept = saved[:count], saved[count:]
    kernel = variant.backward()

    grad_input = [rows.new(x, inputs) for _ in range(count * needs.input)]
    grad_h = x.new_empty((count, batch, width)) if needs.h_0 else None
    grad_c = x.new_empty((count, batch, hidden)) if needs.c_0 else None
    norm_blocks = ceil_div(max(problem.padded_hidden, problem.padded_width), NORM_PANELS * block.lanes)
    squares = [
        buffers.take(2 * steps * batch * norm_blocks, torch.float64).numpy().reshape(2, steps * batch, norm_blocks)
        for _ in range(count * norms)
    ]
    for each in squares:
        each.fill(0)  # rows that have ended, and blocks of h beside those of c where there is a projection
    grad_cells_in = [] if grad_cells is None else _cells_in(problem, grad_cells)

    problem.available = available = threads.available(problem.threads)
    parts = problem.parts()
    share_of = max(1, available // (count * len(parts)))
    most = max(last - first for first, last, _ in parts)
    plan = tiling.plan(steps, most, hidden, width, inputs, block, size, share_of, backward=True)
    chunk_rows = plan.chunk * most
    index = problem.index
    x_step, x_rows = problem.geometry(x)
    y_step, y_rows = problem.geometry(y)
    dx_step, dx_rows = problem.geometry(grad_input[0]) if needs.input else (0, index)
    dy_step, dy_rows = problem.geometry(grad_output) if grad_output is not None else (0, index)
    reset_step, reset_rows = problem.geometry(problem.reset) if problem.reset is not None else (0, index)
    h_rows, m_rows = _multiples(batch, problem.padded_width * size), _multiples(batch, problem.padded_hidden * size)
    panel_rows = _multiples(max(batch, JOINED_ROWS), block.panel * size)
    shared = problem.shape() | {
        "x": x.data_ptr(), "chunk": plan.chunk, "chunk_rows": chunk_rows,
        "reset": 0 if problem.reset is None else problem.reset.data_ptr(),
        "x_step": x_step, "x_rows": x_rows.ctypes.data, "y_step": y_step, "y_rows": y_rows.ctypes.data,
        "dx_step": dx_step, "dx_rows": dx_rows.ctypes.data, "dy_step": dy_step, "dy_rows": dy_rows.ctypes.data,
        "reset_step": reset_step, "reset_rows": reset_rows.ctypes.data,
        "h_rows": h_rows.ctypes.data, "m_rows": m_rows.ctypes.data, "panel_rows": panel_rows.ctypes.data,
        "counter": 0,
    }  # fmt: skip
    gate_size = 4 * problem.padded_hidden
    column_size = problem.columns * hidden * block.panel * problem.projected
    shares = [problem.row_groups(plan, first, last) for first, last, _ in parts]
    borders = [0, *(last for rows in shares for last in rows[1:])]
    h_bytes, c_bytes = (problem.state_bytes(n, borders) for n in (problem.padded_width, problem.padded_hidden))
    whole_bytes = [
        max(problem.padded_hidden, problem.padded_width) * size,
        h_bytes,
        c_bytes,
        batch * problem.padded_width * size,
        batch * problem.padded_hidden * size,
        c_bytes * problem.projected,
        column_panels_size(gate_size, width, block.lanes) * size,
        column_panels_size(gate_size, inputs, block.lanes) * size * needs.input,
        column_panels_size(width, hidden, block.lanes) * size * problem.projected,
    ]
    gradient_sizes = [n * needs.weights for n in (gate_size * inputs, gate_size * width, gate_size, column_size)]
    part_sizes = [
        chunk_rows * gate_size,
        problem.columns * chunk_rows * block.panel * problem.projected,
        chunk_rows * inputs * needs.weights,
        chunk_rows * width * needs.weights,
        chunk_rows * hidden * problem.projected * needs.weights,
        chunk_rows * inputs * variant.staged,
    ]
    results, launches = [], []
    for direction, parameters in enumerate(weights):
        owner, (zero, dh, dc, h_first, c_first, dm, w_h, w_x, w_r) = buffers.carve(*whole_bytes)
        owner.numpy()[: (dm or w_h) - owner.data_ptr()].fill(0)  # NumPy's: see forward
        dh_state = problem.state_groups(owner, dh, problem.padded_width, borders)
        dc_state = problem.state_groups(owner, dc, problem.padded_hidden, borders)
        for state, given in ((dh_state, grad_h_n), (dc_state, grad_c_n)):
            if given is not None:
                problem.load_state(state, given, direction)
        if h_0 is not None:
            problem.load_state([_at(owner, h_first, compute, batch, problem.padded_width)], h_0, direction)
        if c_0 is not None:
            problem.load_state([_at(owner, c_first, compute, batch, problem.padded_hidden)], c_0, direction)
        order = gate_order(hidden, block.lanes)
        _pack_columns(problem, w_h, parameters.weight_hh, order)
        if needs.input:
            _pack_columns(problem, w_x, parameters.weight_ih, order)
        if parameters.weight_hr is not None:
            _pack_columns(problem, w_r, parameters.weight_hr, _multiples(width, 1))
        dy = 0
        if grad_output is not None:
            dy = grad_output.data_ptr() + direction * width * grad_output.itemsize
        whole = shared | {
            "dx": grad_input[direction].data_ptr() if needs.input else 0,
            "norms": squares[direction].ctypes.data if norms else 0,
            "dy": dy,
            "dcells": grad_cells_in[direction].data_ptr() if grad_cells_in else 0,
            "gates": gates[direction].data_ptr(), "cells": kept[direction].data_ptr(),
            "y": y.data_ptr() + direction * width * y.itemsize,
            "h_0": h_first, "c_0": c_first, "zero": zero,
            "w_h": w_h, "w_x": w_x, "w_r": w_r, "reverse": direction,
        }  # fmt: skip
        packed, groups_before = [], 0
        for (first, last, starts), rows_shared in zip(parts, shares, strict=True):
            part_owner, addresses = buffers.carve(*(n * size for n in (*gradient_sizes, *part_sizes)), chunk_rows * 8)
            dw_x, dw_h, db, dw_r, dz, dh_chunk, x_strips, h_strips, m_strips, dx_stage, table = addresses
            packed.append((part_owner, (dw_x, dw_h, db, dw_r)))
            base = whole | {
                "dw_x": dw_x, "dw_h": dw_h, "dw_r": dw_r, "db": db, "dz": dz, "dh_chunk": dh_chunk,
                "x_strips": x_strips, "h_strips": h_strips, "m_strips": m_strips, "dx_stage": dx_stage,
                "table": table, "part_begin": first, "part_end": last,
                "part_starts": 0 if starts is None else starts.ctypes.data,
            }  # fmt: skip
            launches.append([
                BackwardArgs(**base | _moved(groups_before + group, dh=dh, dc=dc, dm=dm), **member)
                for group, member in problem.sharing(plan, rows_shared, by_columns=True)
            ])  # fmt: skip
            groups_before += plan.row_groups
        results.append((packed, dh_state, dc_state, owner))
    _launch(kernel, launches, available)

    gradients = [
        _weight_gradients(problem, parameters, packed, sum(gradient_sizes)) if needs.weights else WeightGradients()
        for parameters, (packed, *_) in zip(weights, results, strict=True)
    ]

    for direction, (_, dh_state, dc_state, _) in enumerate(results):
        if grad_h is not None:
            problem.store_state(grad_h[direction], _joined(dh_state))
        if grad_c is not None:
            problem.store_state(grad_c[direction], _joined(dc_state))
    if needs.input and count == 2:
        grad_input[0] += grad_input[1]
    return Gradients(
        grad_input[0] if needs.input else None,
        grad_h,
        grad_c,
        tuple(gradients),
        _magnitudes(problem, squares) if norms else None,
        _gate_statistics(problem, gates, gate_rows) if gate_rows else None,
    )


def _magnitudes(problem: _Problem, squares: list[np.ndarray]) -> Tensor:
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


def _gate_statistics(problem: _Problem, gates: tuple[Tensor, ...], wanted: int) -> GateStatistics:
    starting = problem.batch if problem.batch_sizes is None else int(problem.batch_sizes[0])
    return statistics(
        problem.variant.statistics(), gates, np.array(sampled_rows(starting, wanted)), problem.batch_sizes,
        problem.row_starts, problem.steps, problem.batch, problem.hidden, problem.block.lanes,
    )  # fmt: skip


def _weight_gradients(problem: _Problem, parameters: Weights, parts: list, values: int) -> WeightGradients:
    """The weight gradients of one direction, in the shapes and the dtype of the weights.

    ``parts``: for each part of the batch (owner, addresses of dw_x, dw_h, db, dw_r), ``values`` values in all.
    """
    bias, weight_hr = None, None
    (_, (dw_x, dw_h, db, dw_r)), *others = parts
    for _, (other, *_) in others:  # the four lie one behind another, without gaps
        share(
            problem.variant.pack.add_to, problem.available, values // problem.block.lanes, values, SumArgs(dw_x, other)
        )
    if parameters.bias_ih is not None:
        bias = _unpack_gates(problem, parameters.bias_ih[:, None], db)[:, 0]
    if parameters.weight_hr is not None:
        weight_hr = _unpack_columns(problem, parameters.weight_hr.T, dw_r).T
    return WeightGradients(
        _unpack_gates(problem, parameters.weight_ih, dw_x),
        _unpack_gates(problem, parameters.weight_hh, dw_h),
        bias,
        None if bias is None else bias.clone(),
        weight_hr,
    )


def _cells_in(problem: _Problem, grad_cells: Tensor) -> list[Tensor]:
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
