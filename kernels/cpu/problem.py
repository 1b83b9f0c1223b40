"""The host's view of a call: sizes, rows, how work is divided among threads, and the layout of scratch memory.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch

from ..contract import GATES, Layer, Rows, state_dtype
from ..integers import ceil_div, starts_of
from . import buffers, products, threads, tiling
from .arguments import BackwardArgs, ForwardArgs
from .backward import backward_kernel
from .forward import forward_kernel
from .jobs import jobs_kernel
from .statistics import norms_kernel, statistics_kernel
from .variant import Variant

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Bytes between the state rows of different threads' groups: two pages, because a prefetcher follows its stream through
# a page and asks for the next one.  If that holds rows of another thread, it fetches what that thread is about to
# write: with the gap inference gains 1.06 and the forward of training 1.02 to 1.2 at H = 16 and 64 (two threads); with
# a gap of one page, half of that.
GAP = 8192
PARTITION = (
    "row_begin", "row_end", "panel_begin", "panel_end", "column_begin", "column_end", "lockstep", "member", "members",
)  # fmt: skip
LATE = ("counter", "following")  # known when the launches are prepared
assert all(args._fields[-len(PARTITION) - len(LATE) :] == (*PARTITION, *LATE) for args in (ForwardArgs, BackwardArgs))


class Table(NamedTuple):
    """A read-only array of int64 for kernels, and its address."""

    values: np.ndarray
    address: int


def _table(values: np.ndarray) -> Table:
    values = np.ascontiguousarray(values, np.int64)
    return Table(values, values.ctypes.data)


@functools.lru_cache(maxsize=1024)
def multiples(count: int, stride: int) -> Table:
    """0, stride, 2 stride, ..."""
    return _table(np.arange(count, dtype=np.int64) * stride)


@functools.lru_cache(maxsize=64)
def _ones(pairs: int) -> Table:
    """Pairs of ones in bfloat16, aligned as torch's memory is."""
    return _table(torch.full((ceil_div(pairs, 2),), 0x3F80_3F80_3F80_3F80, dtype=torch.int64, device="cpu").numpy())


class Kernels:
    """The kernels of a dtype, each compiled when it is first needed, and the parameters they are compiled with."""

    def __init__(self, dtype: torch.dtype) -> None:
        isa, self.compute = tiling.cpu_isa(), state_dtype(dtype)
        self.products = products.this_machines(dtype, isa)
        self.block = tiling.block_shape(isa, self.compute, self.products)
        self.variant = Variant(DTYPES[self.compute], DTYPES[dtype], self.block, isa == "avx512")
        self.size = self.variant.size
        self.operand = dtype if self.products.paired else self.compute  # what products read
        self.staged = self.compute != dtype  # rows of x and dx are converted from and to the tensors' dtype

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


def threads_worth_of(layer: Layer, total: int) -> int:
    """How many threads a call of ``total`` tokens is worth, however many there are."""
    return tiling.threads_worth(total * layer.gates * (layer.input_size + layer.width) * layer.directions)


def threads_for(layer: Layer, total: int) -> int:
    """How many threads a call of ``total`` tokens is worth, and has."""
    worth = threads_worth_of(layer, total)
    return worth if worth == 1 else min(threads.count(), worth)


class Active(NamedTuple):
    """Which rows are active at each step, if not all of them always are; arrays of int64."""

    batch_sizes: np.ndarray  # (T,)
    order: np.ndarray | None  # (B,); None: the user's
    packed: bool

    @staticmethod
    def of(rows: Rows) -> Active | None:
        if rows.batch_sizes is None:
            return None
        return Active(rows.batch_sizes.numpy(), None if rows.order is None else rows.order.numpy(), rows.packed)


OWN = ("arguments", "scratch")  # the buffers that are not tensors of the call


class Buffers:
    """The memory that a call's arguments point to: each buffer has a number, a placeholder for its address.

    Scratch is one of them; :meth:`reserve` allots pieces of it.
    """

    SHIFT = 52  # addresses of a process are below this many bits

    def __init__(self) -> None:
        self.numbers: dict[object, int] = {name: number for number, name in enumerate(OWN, 1)}
        self.scratch = 0  # bytes

    def at(self, name: object, offset: int = 0) -> int:
        """The placeholder of an address: the number of the buffer called ``name``, and bytes from its start."""
        return self.numbers.setdefault(name, len(self.numbers) + 1) << self.SHIFT | offset

    def reserve(self, **sizes: int) -> dict[str, int]:
        """Placeholders of aligned pieces of scratch of these ``sizes`` in bytes; 0 for a size of 0."""
        pieces = {}
        for name, size in sizes.items():
            pieces[name] = self.at("scratch", self.scratch) if size else 0
            self.scratch += ceil_div(size, buffers.ALIGN) * buffers.ALIGN
        return pieces


class Template:
    """Arguments with placeholders, which each call replaces by addresses."""

    def __init__(self, values: np.ndarray) -> None:
        self._number = values >> Buffers.SHIFT
        self._offset = values - (self._number << Buffers.SHIFT)

    def fill(self, values: np.ndarray, addresses: np.ndarray) -> None:
        """Writes the arguments to ``values``; buffer n is at ``addresses[n]``, and ``addresses[0]`` is 0."""
        np.add(self._offset, addresses[self._number], out=values)


class Problem:
    """The sizes and the rows of a kind of call; it owns the tables that it gives the addresses of.

    ``stack``, ``index``: of a layer of a stack, the problem of the whole and the layer's number.
    """

    def __init__(
        self, layer: Layer, active: Active | None, available: int, stack: Problem | None = None, index: int = 0
    ) -> None:
        self.kernels = kernels = kernels_of(layer.dtype)
        self.layer, self.available, self.block = layer, available, kernels.block
        self.size, self.stored = kernels.size, layer.dtype.itemsize  # bytes of a value: computed, in tensors
        self.operand_bytes = kernels.variant.operand_size
        self.steps, self.batch, self.directions = layer.steps, layer.batch, layer.directions
        self.inputs, self.hidden, self.width = layer.input_size, layer.hidden_size, layer.width
        self.projected, self.packed = layer.projected, active is not None and active.packed
        self.panels = ceil_div(self.hidden, self.block.lanes)
        self.padded_hidden, self.padded_width = self.block.padded(self.hidden), self.block.padded(self.width)
        self.padded_gates = GATES * self.padded_hidden
        self.columns = ceil_div(self.width, self.block.panel)
        self.terms, self.operand_row = kernels.products.terms, kernels.variant.operand_row
        # rows that a block may read beyond those it has
        self.rows_beyond = products.TILE_ROWS - 1 if kernels.products.tiled else 0
        self.buffers: Buffers = Buffers() if stack is None else stack.buffers
        self._index = None if stack is None else index
        self._tables: list[Table] = []
        self.batch_sizes, self.starts, self.order, sizes, starts = None, None, None, 0, 0
        if active is not None:
            self.order = active.order
            self.batch_sizes, sizes = self.table(active.batch_sizes)
            self.starts, starts = self.table(starts_of(self.batch_sizes))
        self.shape = {  # the arguments that both kernels share
            "steps": self.steps, "first": 0, "last": self.steps, "batch": self.batch,
            "turn": 0, "done": 0, "done_before": 0,
            "inputs": self.inputs, "hidden": self.hidden, "width": self.width,
            "batch_sizes": sizes, "row_starts": starts, "packed": int(self.packed),
            **dict.fromkeys((*PARTITION, *LATE), 0),
        }  # fmt: skip

    def at(self, name: object, offset: int = 0) -> int:
        """The placeholder of an address in a tensor of this call, ``(index, name)`` among the buffers of a stack."""
        return self.buffers.at(name if self._index is None else (self._index, name), offset)

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

    def ones(self, terms: int) -> int:
        """The address of a strip of a column of ones, of so many terms of pairs."""
        table = _ones(terms * self.block.rows)
        self._tables.append(table)
        return table.address

    def offsets(self, stride: int) -> Table:
        """Offset of each sorted row among rows in the user's order that are ``stride`` bytes apart."""
        return self.multiples(self.batch, stride) if self.order is None else self.table(self.order * stride)

    def geometry(self, name: str, strides: tuple[int, ...] | None, itemsize: int) -> dict[str, int]:
        """The arguments for a user's tensor of these strides: bytes per step, offsets of sorted rows."""
        if strides is None:
            return {f"{name}_step": 0, f"{name}_rows": self.multiples(self.batch, 1).address}
        rows = self.offsets(strides[0 if self.packed else 1] * itemsize)
        return {f"{name}_step": strides[0] * itemsize, f"{name}_rows": rows.address}

    def state_bytes(self, row: int, borders: list[int]) -> int:
        """Bytes of a state of B rows of ``row`` bytes; a gap follows each of several row groups."""
        groups = len(borders) - 1
        return self.batch * row + groups * GAP * (groups > 1)

    def state_rows(self, row: int, borders: list[int]) -> Table:
        """Offsets of the rows of such a state."""
        rows = self.multiples(self.batch, row)
        if len(borders) <= 2:
            return rows
        groups = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
        return self.table(rows.values + groups * GAP)

    def last_rows(self, h: int, rows: Table, h_half: int, direction: int) -> tuple[int, Table]:
        """(address, offsets) of the last h that each row wrote: steps alternate between the halves of h (2, B, P')."""
        if self.batch_sizes is None or direction == 1:
            return h + (self.steps & 1) * h_half, rows
        lengths = (self.batch_sizes[:, None] > np.arange(self.batch)).sum(0)
        return h, self.table(rows.values + (lengths & 1) * h_half)

    def active(self, first: int, last: int) -> np.ndarray | None:
        """Number of active rows among rows ``first`` to ``last`` at each step: (T,), or None if all always are."""
        return None if self.batch_sizes is None else np.clip(self.batch_sizes - first, 0, last - first)

    def parts(self) -> list[tuple[int, int, int]]:
        """The parts of the batch in backward: (first row, end row, address of its tokens before each step or 0)."""
        count = tiling.parts(self.batch, self.hidden, self.width, self.inputs, self.block, self.size, self.directions)
        result = []
        for first, last in itertools.pairwise(tiling.balanced_rows(self.batch_sizes, self.batch, count)):
            starts, active = 0, self.active(first, last)
            if active is not None:
                starts = self.table(starts_of(active)).address
            if last > first:
                result.append((first, last, starts))
        return result

    def chunks(self, first: int, last: int, chunk: int, room: int, direction: int) -> dict[str, int]:
        """The arguments that say where the chunks of rows ``first`` to ``last`` begin.

        If rows are ragged, a chunk has as many steps as fit ``room`` tokens: with equal numbers of steps, chunks with
        few active rows would read and write all weight gradients for a handful of tokens.
        """
        active = self.active(first, last)
        if active is None:
            return {"chunk_borders": 0, "chunks": ceil_div(self.steps, chunk)}
        borders = tiling.ragged_chunks(active if direction == 0 else active[::-1], room)
        return {"chunk_borders": self.table(borders).address, "chunks": len(borders) - 1}

    def row_groups(self, plan: tiling.Plan, first: int, last: int) -> list[int]:
        """The borders of the row groups of rows ``first`` to ``last``."""
        return [first + r for r in tiling.balanced_rows(self.active(first, last), last - first, plan.row_groups)]

    def members(
        self, arguments: ForwardArgs | BackwardArgs, plan: tiling.Plan, borders: list[int], groups_before: int = 0
    ) -> np.ndarray:
        """The arguments of each member of a launch, (members, fields) int64.

        ``borders``: of its row groups, which ``groups_before`` others precede.  The state addresses of a member
        include the gaps before its row group, so it indexes rows as if there were none.
        """
        backward = isinstance(arguments, BackwardArgs)
        ranges, groups = partition(plan, tuple(borders), self.columns, self.panels, backward)
        structs = np.empty((len(ranges), len(arguments)), np.int64)
        structs[:] = arguments
        structs[:, -len(PARTITION) - len(LATE) : -len(LATE)] = ranges
        if groups_before or plan.row_groups > 1:
            for name in ("dh", "dc", "dm", "dh_operands") if backward else ("h", "c", "m"):
                address = getattr(arguments, name)
                if address:
                    structs[:, arguments._fields.index(name)] = address + (groups_before + groups) * GAP
        return structs


@functools.lru_cache(maxsize=1024)
def partition(
    plan: tiling.Plan, rows: tuple[int, ...], columns: int, panels: int, by_columns: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ranges of each member (members, PARTITION) and its row group (members,); ``rows``: borders of row groups."""
    groups = plan.unit_groups
    column_borders = [columns * g // groups for g in range(groups + 1)]
    if by_columns:
        blocks = ceil_div(panels, 4)
        panel_borders = [min(panels, 4 * (blocks * g // groups)) for g in range(groups + 1)]
    else:
        panel_borders = [panels * g // groups for g in range(groups + 1)]
    partition, row_groups = [], []
    for member in range(plan.members):
        row, unit = divmod(member, groups)
        row_groups.append(row)
        partition.append((
            rows[row], rows[row + 1], panel_borders[unit], panel_borders[unit + 1],
            column_borders[unit], column_borders[unit + 1], int(groups > 1), member, plan.members,
        ))  # fmt: skip
    return np.array(partition, np.int64), np.array(row_groups, np.int64)


def side_by_side(members: int, count: int) -> int:
    """How many launches of ``members`` members each run at once on ``count`` threads; at least one whole launch."""
    return max(1, count // members)
