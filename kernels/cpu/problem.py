"""What the host knows of a call: its sizes and rows, how they are shared out, and where scratch lies.

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch

from ..contract import GATES, Layer, Rows, state_dtype
from ..integers import ceil_div, starts_of
from . import buffers, threads, tiling
from .arguments import BackwardArgs, ForwardArgs
from .backward import backward_kernel
from .forward import forward_kernel
from .jobs import jobs_kernel
from .statistics import norms_kernel, statistics_kernel
from .variant import Variant

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Bytes between the state rows of different threads' groups: two pages, for a prefetcher follows its stream through a
# page and asks for the next.  Where they hold rows of another thread, it fetches what that is about to write: apart,
# inference gains 1.06 and the forward of training 1.02 to 1.2 at H = 16 and 64 (two threads); one page, half of that.
GAP = 8192
SHARE = (
    "row_begin", "row_end", "panel_begin", "panel_end", "column_begin", "column_end", "lockstep", "member", "members",
)  # fmt: skip
LATE = ("counter", "following")  # known when the launches are laid out
assert all(record._fields[-len(SHARE) - len(LATE) :] == (*SHARE, *LATE) for record in (ForwardArgs, BackwardArgs))


class Table(NamedTuple):
    """An array of int64 for kernels, not to be written, and where it is."""

    values: np.ndarray
    address: int


def _table(values: np.ndarray) -> Table:
    values = np.ascontiguousarray(values, np.int64)
    return Table(values, values.ctypes.data)


@functools.lru_cache(maxsize=1024)
def multiples(count: int, stride: int) -> Table:
    """0, stride, 2 stride, ..."""
    return _table(np.arange(count, dtype=np.int64) * stride)


class Kernels:
    """What a dtype is computed with: how, and the compiled kernels, each made when it is first asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        isa, self.compute = tiling.cpu_isa(), state_dtype(dtype)
        self.block = tiling.block_shape(isa, self.compute)
        self.variant = Variant(DTYPES[self.compute], DTYPES[dtype], self.block, isa == "avx512")
        self.size = self.variant.size
        self.staged = self.compute != dtype  # rows are copied into the compute dtype

    def jobs(self) -> Any:
        return jobs_kernel(self.variant)

    def forward(self) -> Any:
        return forward_kernel(self.variant)

    def backward(self) -> Any:
        return backward_kernel(self.variant)

    def statistics(self) -> Any:
        return statistics_kernel(self.variant)

    def norms(self) -> Any:
        return norms_kernel(self.variant.scalar)


@functools.cache
def kernels_of(dtype: torch.dtype) -> Kernels:
    return Kernels(dtype)


def threads_for(layer: Layer, total: int) -> int:
    """How many threads a call of ``total`` alive rows is worth."""
    worth = tiling.threads_worth(total * layer.gates * (layer.input_size + layer.width) * layer.directions)
    return worth if worth == 1 else min(threads.count(), worth)


class Alive(NamedTuple):
    """Which rows are alive, where not all are at every step; arrays of int64."""

    batch_sizes: np.ndarray  # (T,)
    order: np.ndarray | None  # (B,); None: the user's
    packed: bool

    @staticmethod
    def of(rows: Rows) -> Alive | None:
        if rows.batch_sizes is None:
            return None
        return Alive(rows.batch_sizes.numpy(), None if rows.order is None else rows.order.numpy(), rows.packed)


class Buffers:
    """The memory that a call's arguments point to, each by a number that stands for its address until that is known.

    Scratch is one of them: :meth:`lay` gives it a place.
    """

    SHIFT = 52  # addresses of a process are below this many bits

    def __init__(self) -> None:
        self.numbers: dict[object, int] = {}
        self.scratch = 0  # bytes

    def at(self, name: object, offset: int = 0) -> int:
        """What stands for an address: the number of the buffer called ``name``, and bytes from its start."""
        return self.numbers.setdefault(name, len(self.numbers) + 1) << self.SHIFT | offset

    def lay(self, **sizes: int) -> dict[str, int]:
        """Aligned pieces of scratch, in bytes; 0 for a piece of 0 bytes."""
        pieces = {}
        for name, size in sizes.items():
            pieces[name] = self.at("scratch", self.scratch) if size else 0
            self.scratch += ceil_div(size, buffers.ALIGN) * buffers.ALIGN
        return pieces


class Template:
    """Arguments whose addresses are given at each call."""

    def __init__(self, values: np.ndarray) -> None:
        self._number = values >> Buffers.SHIFT
        self._offset = values - (self._number << Buffers.SHIFT)

    def fill(self, values: np.ndarray, addresses: np.ndarray) -> None:
        """Writes the arguments to ``values``, where buffer n lies at ``addresses[n]`` (that of 0 is 0)."""
        np.add(self._offset, addresses[self._number], out=values)


class Problem:
    """The sizes and the rows of a kind of call.  What it gives addresses of lives as long as it does."""

    def __init__(self, layer: Layer, alive: Alive | None, available: int):
        self.kernels = kernels = kernels_of(layer.dtype)
        self.layer, self.available, self.block, self.size = layer, available, kernels.block, kernels.size
        self.steps, self.batch, self.directions = layer.steps, layer.batch, layer.directions
        self.inputs, self.hidden, self.width = layer.input_size, layer.hidden_size, layer.width
        self.projected, self.packed = layer.projected, alive is not None and alive.packed
        self.panels = ceil_div(self.hidden, self.block.lanes)
        self.padded_hidden, self.padded_width = self.block.padded(self.hidden), self.block.padded(self.width)
        self.padded_gates = GATES * self.padded_hidden
        self.columns = ceil_div(self.width, self.block.panel)
        self.buffers = Buffers()
        self._tables: list[Table] = []
        self.batch_sizes, self.order, sizes, starts = None, None, 0, 0
        if alive is not None:
            self.order = alive.order
            self.batch_sizes, sizes = self.table(alive.batch_sizes)
            starts = self.table(starts_of(self.batch_sizes)).address
        self.shape = {  # the arguments that both kernels share
            "steps": self.steps, "batch": self.batch, "inputs": self.inputs, "hidden": self.hidden, "width": self.width,
            "batch_sizes": sizes, "row_starts": starts, "packed": int(self.packed),
            "h_rows": self.multiples(self.batch, self.padded_width * self.size).address,
            "m_rows": self.multiples(self.batch, self.padded_hidden * self.size).address,
            **dict.fromkeys((*SHARE, *LATE), 0),
        }  # fmt: skip

    def table(self, values: np.ndarray) -> Table:
        """``values`` for the kernels of this call."""
        table = _table(values)
        self._tables.append(table)
        return table

    def multiples(self, count: int, stride: int) -> Table:
        """0, stride, 2 stride, ..."""
        table = multiples(count, stride)
        self._tables.append(table)
        return table

    def offsets(self, stride: int) -> Table:
        """Where each sorted row lies, among rows in the user's order that are ``stride`` bytes apart."""
        return self.multiples(self.batch, stride) if self.order is None else self.table(self.order * stride)

    def geometry(self, name: str, strides: tuple[int, ...] | None) -> dict[str, int]:
        """The arguments (bytes from step to step, offsets of sorted rows) of a user's tensor of these strides."""
        if strides is None:
            return {f"{name}_step": 0, f"{name}_rows": self.multiples(self.batch, 1).address}
        rows = self.offsets(strides[0 if self.packed else 1])
        return {f"{name}_step": strides[0], f"{name}_rows": rows.address}

    def state_bytes(self, columns: int, borders: list[int]) -> int:
        """Bytes of a state (B, columns) of whole vectors; a gap follows each of several row groups."""
        groups = len(borders) - 1
        return self.batch * columns * self.size + groups * GAP * (groups > 1)

    def state_rows(self, columns: int, borders: list[int]) -> Table:
        """Where the rows of such a state lie."""
        rows = self.multiples(self.batch, columns * self.size)
        if len(borders) <= 2:
            return rows
        groups = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
        return self.table(rows.values + groups * GAP)

    def last_rows(self, h: int, rows: Table, h_half: int, direction: int) -> tuple[int, Table]:
        """(address, offsets) of what each row of h (2, B, P') wrote last: its steps alternate between both halves."""
        if self.batch_sizes is None or direction == 1:
            return h + (self.steps & 1) * h_half, rows
        lengths = (self.batch_sizes[:, None] > np.arange(self.batch)).sum(0)
        return h, self.table(rows.values + (lengths & 1) * h_half)

    def alive(self, first: int, last: int) -> np.ndarray | None:
        """Rows alive at each step among rows ``first`` to ``last``: (T,), or None where all are."""
        return None if self.batch_sizes is None else np.clip(self.batch_sizes - first, 0, last - first)

    def parts(self) -> list[tuple[int, int, int]]:
        """The parts of the batch in backward: (first row, last row, rows of the part before each step or 0)."""
        count = tiling.parts(self.batch, self.hidden, self.width, self.inputs, self.block, self.size, self.directions)
        result = []
        for first, last in itertools.pairwise(tiling.balanced_rows(self.batch_sizes, self.batch, count)):
            starts, alive = 0, self.alive(first, last)
            if alive is not None:
                starts = self.table(starts_of(alive)).address
            if last > first:
                result.append((first, last, starts))
        return result

    def chunks(self, first: int, last: int, chunk: int, room: int, direction: int) -> dict[str, int]:
        """The arguments that say where the chunks of rows ``first`` to ``last`` begin.

        Of ragged rows a chunk has as many steps as ``room`` has rows for: with as many everywhere, those in which few
        rows are left would read and write all weight gradients for a handful of rows.
        """
        alive = self.alive(first, last)
        if alive is None:
            return {"chunk_borders": 0, "chunks": ceil_div(self.steps, chunk)}
        borders = tiling.ragged_chunks(alive if direction == 0 else alive[::-1], room)
        return {"chunk_borders": self.table(borders).address, "chunks": len(borders) - 1}

    def row_groups(self, plan: tiling.Plan, first: int, last: int) -> list[int]:
        """The borders of the row groups of rows ``first`` to ``last``."""
        return [first + r for r in tiling.balanced_rows(self.alive(first, last), last - first, plan.row_groups)]

    def records(
        self, arguments: ForwardArgs | BackwardArgs, plan: tiling.Plan, borders: list[int], groups_before: int = 0
    ) -> np.ndarray:
        """The records of a launch, one a member; ``borders``: of its row groups, ``groups_before`` others.

        Members see the states as if all lay as those of their row group do.
        """
        backward = isinstance(arguments, BackwardArgs)
        share, groups = _sharing(plan, tuple(borders), self.columns, self.panels, backward)
        records = np.empty((len(share), len(arguments)), np.int64)
        records[:] = arguments
        records[:, -len(SHARE) - len(LATE) : -len(LATE)] = share
        if groups_before or plan.row_groups > 1:
            for name in ("dh", "dc", "dm") if backward else ("h", "c", "m"):
                address = getattr(arguments, name)
                if address:
                    records[:, arguments._fields.index(name)] = address + (groups_before + groups) * GAP
        return records


@functools.lru_cache(maxsize=1024)
def _sharing(
    plan: tiling.Plan, rows: tuple[int, ...], columns: int, panels: int, by_columns: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What each member does (members, SHARE), and its row group (members,); ``rows``: borders of the row groups."""
    groups = plan.unit_groups
    column_borders = [columns * g // groups for g in range(groups + 1)]
    if by_columns:
        blocks = ceil_div(panels, 4)
        panel_borders = [min(panels, 4 * (blocks * g // groups)) for g in range(groups + 1)]
    else:
        panel_borders = [panels * g // groups for g in range(groups + 1)]
    share, row_groups = [], []
    for member in range(plan.members):
        row, unit = divmod(member, groups)
        row_groups.append(row)
        share.append((
            rows[row], rows[row + 1], panel_borders[unit], panel_borders[unit + 1],
            column_borders[unit], column_borders[unit + 1], int(groups > 1), member, plan.members,
        ))  # fmt: skip
    return np.array(share, np.int64), np.array(row_groups, np.int64)


def side_by_side(members: int, count: int) -> int:
    """How many launches of ``members`` records each run at once on ``count`` threads; a launch is never cut."""
    return max(1, count // members)
