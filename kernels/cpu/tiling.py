"""From shape, dtype and machine to block sizes: pure functions, testable anywhere.

Everything here is arithmetic on small integers; nothing allocates, compiles or reads a tensor.  The measurements behind
a choice are given next to it.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..integers import ceil_div
from . import caches
from .products import FMA, TILE_ROWS, TILE_TERMS, Products

# Bytes of vector register and number of registers.
REGISTERS = {"avx512": (64, 32), "avx2": (32, 16), "neon": (16, 32), "generic": (16, 16)}


@functools.lru_cache(maxsize=1)
def cpu_isa() -> str:
    """The instruction set that blocks are shaped for: "avx512", "avx2", "neon" or "generic"."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return "neon"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "avx512"
    return "avx2" if capability == "AVX2" else "generic"


@dataclass(frozen=True)
class Block:
    """The shape of a register block, and so of the packed weights."""

    lanes: int  # values in a vector
    rows: int  # of a block as wide as a panel: four vectors, one per gate
    registers: int = 32  # of the processor, for vectors
    products: Products = FMA

    @property
    def panel(self) -> int:
        """Columns of a packed panel: four gates of ``lanes`` units, or four vectors of any matrix."""
        return 4 * self.lanes

    def padded(self, values: int) -> int:
        """``values`` in whole vectors."""
        return ceil_div(values, self.lanes) * self.lanes

    def row_choices(self, vectors: int) -> tuple[int, ...]:
        """The numbers of block rows that a block of ``vectors`` vectors (1, 2 or 4) is compiled for.

        Narrow blocks have more rows, to have enough independent sums in flight: a fused multiply-add takes 4 cycles and
        two start per cycle, so at least 8 sums are needed.
        """
        if vectors == 4:
            return tuple(range(1, self.rows + 1))
        most = min(2 * self.rows, (self.registers - vectors - 1) // vectors)
        return tuple(r for r in (1, 2, 4, 6, 12) if r <= most)  # not all of them: each takes time to compile


def block_shape(isa: str, dtype: torch.dtype, products: Products = FMA) -> Block:
    """The register block for computing in ``dtype`` (16-bit types compute in float32).

    32 registers hold 6 rows x 4 vectors, the 4 vectors of weights and a broadcast; a seventh row makes them spill
    (measured: 7 rows 105 GF/s, 6 rows 137).  16 registers hold half of that: 6 rows x 2 vectors at a time.
    """
    width, registers = REGISTERS[isa]
    lanes = width // (8 if dtype == torch.float64 else 4)
    if products.paired:  # such blocks are those of AVX-512, whatever emulates them
        lanes, registers = TILE_TERMS, REGISTERS["avx512"][1]
    return Block(lanes, TILE_ROWS if products.tiled else 6, registers, products)


class Core(NamedTuple):
    """Parameters of a core in the model of a step; ``rate`` and ``peak`` are for terms of four bytes, as float32's."""

    # Share of the peak that a block of 1, 2, ... rows reaches with its weights in the second-level cache; small blocks
    # are limited by reading weights.
    rate: tuple[float, ...]
    peak: float  # multiply-adds per nanosecond; the scale of the model, not a promise
    cache: float  # bytes of weights that stay in the second-level cache next to everything else
    far: float  # bytes per nanosecond that a core reads from beyond that cache
    cell: float = 0.0  # nanoseconds of the cell of a unit of a row, where products do not outweigh it


def core_of(isa: str, found: caches.Caches) -> Core:
    """Rates as measured on a Xeon (AVX-512) and on an AMD EPYC (Zen 3, AVX2), by the number of registers.

    ``far`` was fitted to the plans that measured best: AMD's third-level caches are close (each of two cores reads
    2 MiB of weights at 60 bytes per nanosecond; for larger weights 30 fits), a Xeon's is across a mesh.
    """
    width, registers = REGISTERS[isa]
    rate = (0.25, 0.45, 0.6, 0.8, 0.93, 1.0) if registers == 32 else (0.46, 0.8, 0.71, 0.91, 0.97, 1.0)
    far = 30.0 if found.vendor == "AuthenticAMD" else 12.0
    return Core(rate, min(64.0, 1.5 * width), 0.6 * found.second_level, far)


# AMX: nanoseconds in which a block of 16 rows of four vectors multiplies a group of terms, whose 4 KiB of weights come
# from the second-level cache; from the first they take 27 (a Xeon of 2.5 GHz).  Fewer rows take as long.
TILE_TIME = 40.0
# Nanoseconds of the cell, for a unit of a row.
CELL_TIME = 1.4


def tile_core(found: caches.Caches) -> Core:
    """Rates of AMX, in terms; a block takes as long for one row as for 16."""
    rate = tuple((rows + 1) / TILE_ROWS for rows in range(TILE_ROWS))
    peak = TILE_ROWS * 64 * TILE_TERMS / TILE_TIME
    return Core(rate, peak, 0.6 * found.second_level, 12.0, CELL_TIME)


@functools.cache
def this_core(products: Products = FMA) -> Core:
    found = caches.read()
    if products.tiled:
        return tile_core(found)
    return core_of(cpu_isa(), found)  # of dot products as well, in terms


# A barrier in each step costs: nanoseconds with two threads, including the transfer of the other thread's h; the factor
# by which waiting for the slower thread lengthens a step; nanoseconds per further thread (predicted, not measured).
HANDOFF, LOCKSTEP, ARRIVAL = 1000.0, 1.08, 100.0
MEMORY = 512 * 1024  # bytes of a chunk's gates
# Inputs of up to this size are projected inside the recurrence: the traffic of z costs more than full blocks gain.  (At
# H = I = 64 both are equally fast; at H = I = 128, B = 32 projecting ahead reaches 121 GF/s, not 93: its weights stay
# in a closer cache.)
FUSED = 64
# With one row per member, a block reads the weights from the second-level cache for a single row: projecting ahead
# reads W_ih once for six.  (I = H = 64, B = 1: 2.06 ms for 1000 steps fused, 1.63 ahead; I = 16: equal.)
FUSED_ONE_ROW = 16
# Tiles are as full inside the recurrence as ahead of it from this number of rows on: then z need not be written and
# read, if all weights stay in the second-level cache.
FUSED_TILE_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """How one direction of a layer is divided among threads and into chunks of steps."""

    row_groups: int  # groups of rows: independent, no barrier
    unit_groups: int  # groups of hidden units: one barrier per step
    chunk: int  # steps that are projected together, and whose weight gradients are computed together
    fused: bool  # the input projection runs inside the recurrence, not ahead of it

    @property
    def members(self) -> int:
        return self.row_groups * self.unit_groups


def step_time(rows: int, units: int, depth: int, size: int, core: Core) -> float:
    """Modelled nanoseconds of a thread in a step: ``rows`` x 4 ``units`` sums of ``depth`` terms of ``size`` bytes."""
    count = ceil_div(rows, len(core.rate))  # blocks, as equal as possible
    smaller, larger = rows // count, rows % count
    blocks = (count - larger) * smaller / core.rate[smaller - 1]
    blocks += larger * (smaller + 1) / core.rate[smaller] if larger else 0.0
    arithmetic = blocks * 4 * units * depth / (core.peak * 4 / size)
    weight_bytes = 4 * units * depth * size
    time = arithmetic if weight_bytes <= core.cache else max(arithmetic, weight_bytes / core.far)
    return time + rows * units * core.cell


def shared_step_time(
    batch: int,
    hidden: int,
    depth: int,
    inputs: int,
    row_groups: int,
    unit_groups: int,
    block: Block,
    size: int,
    core: Core,
) -> float:
    """Modelled nanoseconds of a step that is divided into so many groups."""
    depth, inputs = block.products.terms(depth), block.products.terms(inputs)
    rows = ceil_div(batch, row_groups)
    units = ceil_div(ceil_div(hidden, block.lanes), unit_groups) * block.lanes
    time = step_time(rows, units, depth, size, core)
    # The projection joins tokens of several steps, so it always fills its blocks.
    time += rows * units * 4 * inputs / (core.peak * 4 / size)
    return time if unit_groups == 1 else time * LOCKSTEP + HANDOFF + ARRIVAL * (row_groups * unit_groups - 2)


@functools.lru_cache(maxsize=4096)
def plan(
    steps: int,
    batch: int,
    hidden: int,
    depth: int,
    inputs: int,
    block: Block,
    size: int,
    threads: int,
    backward: bool = False,
    core: Core | None = None,
) -> Plan:
    """The plan for one direction; ``depth`` is P or H (what the recurrence sums over), ``inputs`` is I.

    Threads get rows if there are enough to fill a block for each and the weights fit every thread's cache: then no
    thread waits for another within a chunk.  Otherwise they get hidden units, each keeps its own weights in its cache,
    and a barrier joins them in each step.  The results do not depend on the choice, and the chunk does not depend on
    ``threads``.  ``core``: this machine's if None.
    """
    core = core or this_core(block.products)
    panels = ceil_div(hidden, block.lanes)
    best = (float("inf"), 1, 1)
    for members in range(1, threads + 1):
        for unit_groups in range(1, min(members, ceil_div(panels, 4) if backward else panels) + 1):
            row_groups, odd = divmod(members, unit_groups)
            if odd or row_groups > batch:
                continue
            time = shared_step_time(batch, hidden, depth, inputs, row_groups, unit_groups, block, size, core)
            best = min(best, (time, members, unit_groups))
    _, members, unit_groups = best
    row_bytes = 4 * panels * block.lanes * size
    if backward:  # weight gradients are read and written once per chunk; more tokens if that traffic counts
        small = 4 * panels * block.lanes * (depth + inputs) * size <= GRADIENTS
        chunk_tokens = min(256, CHUNK_STEPS * batch) if small else 512
    else:
        chunk_tokens = min(max(MEMORY // row_bytes, 96), 4096)
    chunk = max(1, min(steps, chunk_tokens // batch))
    row_groups = members // unit_groups
    if block.products.tiled:
        terms = block.products.terms(depth) + block.products.terms(inputs)
        near = 4 * ceil_div(panels, unit_groups) * block.lanes * terms * size <= core.cache
        fused = near and ceil_div(batch, row_groups) >= FUSED_TILE_ROWS
    else:
        fused = inputs <= (FUSED_ONE_ROW if row_groups == batch else FUSED)
    return Plan(row_groups, unit_groups, chunk, fused)


# Bytes of weight gradients up to which a chunk has 256 tokens, and a batch two parts.
GRADIENTS = 1.25e6
# Steps that such a chunk has at most: as fast as 256 for one row or two (H 16 to 128, AMD EPYC with AVX-512), and a
# wavefront, which goes on from chunk to chunk, rises sooner.
CHUNK_STEPS = 64
# Rows from which a batch has two parts, and rows per part if it has more; rows times units per part then; most parts.
PART_ROWS, PART_STEP, MOST_PARTS = 8, 512, 8


def parts(batch: int, hidden: int, depth: int, inputs: int, block: Block, size: int, directions: int) -> int:
    """The number of parts of the batch in a backward, each with weight gradients of its own, added up at the end (the
    field's split-K).

    A thread then multiplies what it has just written and does not wait for other threads until the end.  With one set
    of weight gradients every thread reads the tokens of all, and waits twice per chunk: two threads lost to two
    processes with half the batch each by 1.57 at H = 16, 1.24 at H = 64, 1.1 at H = 128 (B = 32).  Two directions are
    already two parts (split into four, H = 64, B = 8 took 1.1 times as long).  The number decides the bits, so it may
    not depend on the number of threads: it is a power of two, chosen for more threads than two.  Two threads lose 3 to
    6 % with four parts instead of two at B = 32 and H = 64 or 128, nothing with eight at B = 64 (AMD EPYC, Zen 3); at
    H = 16 and at H = 256 they would lose 10 %, so there are two.  A part may still be divided among several threads,
    and a thread may process several parts.
    """
    weight_bytes = 4 * ceil_div(hidden, block.lanes) * block.lanes * max(depth, inputs) * size
    if batch < PART_ROWS or weight_bytes > GRADIENTS:
        return 1
    worth = min(batch // PART_ROWS, batch * hidden // PART_STEP, MOST_PARTS) if weight_bytes <= GRADIENTS / 4 else 2
    most = max(1, max(2, worth) // directions)
    return 1 << most.bit_length() - 1


# Multiply-adds that take as long as waking one more thread (about 30 microseconds).
WORTH_A_THREAD = 1_000_000


def threads_worth(multiply_adds: int) -> int:
    """How many threads a call of ``multiply_adds`` is worth."""
    return 1 + multiply_adds // WORTH_A_THREAD


def ragged_chunks(active: np.ndarray, room: int) -> np.ndarray:
    """Borders of chunks of steps, each as long as ``room`` tokens allow; ``active``: (T,) rows of each step.

    ``room`` is no less than the rows of any step.
    """
    before = np.concatenate(([0], np.cumsum(active)))
    borders = [0]
    while borders[-1] < len(active):
        borders.append(int(np.searchsorted(before, before[borders[-1]] + room, side="right")) - 1)
    return np.array(borders, np.int64)


def balanced_rows(batch_sizes, batch: int, groups: int) -> list[int]:
    """Borders of ``groups`` ranges of the sorted rows with about equal numbers of tokens.

    ``batch_sizes``: (T,) NumPy array, never increasing, or None if all rows have all steps.
    """
    if batch_sizes is None or groups == 1:
        return [batch * g // groups for g in range(groups + 1)]
    lengths = (batch_sizes[None, :] > np.arange(batch)[:, None]).sum(1)
    middles = (2 * np.cumsum(lengths) - lengths) * groups
    # A row that crosses a border goes to the group that holds most of it; surplus groups are empty.
    ends = np.searchsorted(middles, 2 * lengths.sum() * np.arange(1, groups))
    return [0, *map(int, ends), batch]
