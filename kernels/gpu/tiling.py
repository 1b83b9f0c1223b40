"""The GPU half of the tiling: from sizes, dtype and device to a design and its tiles; pure functions.

Every program of the resident and the split design keeps its slice of the recurrent weights in registers (``split.py``
says how), one of the wide design in shared memory and registers: what fits there decides the design.  Among the tiles
that fit, a model of a step's time chooses.  K chunk: terms of a row of h or dz that are received together.

The model's constants were fitted to what ``python -m bench designs`` measured on an H200 (bfloat16): those of the wide
design to 15 of its designs at H 512 and 1024, B 256, the others earlier to 71 designs of eight shapes from H 128 to
1024 and B 16 to 256.  Of the rows there are now it is 8 % off on average and 27 % at most.  They are in
bench/results/nvidia-h200-132sm.csv, and tests/bench/test_designs.py holds the model and its choices to them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from ..integers import ceil_div

# Bytes of one weight in registers.  Strict float32 multiplies with three TF32 products of a high and a low half of each
# operand; both halves are kept.
WEIGHT = {"16": 2, "tf32": 4, "float32": 8}
STATE = {"16": 2, "tf32": 4, "float32": 4}  # bytes of an entry of h or dz
# The fewest terms of a K chunk per warp: sixteen per instruction (Triton 3.6 requires as many for float32 too), and
# both halves of words that hold two 16-bit entries.
DEPTH = {"16": 32, "tf32": 16, "float32": 16}

# Of a thread's 255 registers, at most, for weights: with twice as many nothing is left for sums and h (`make kernels`
# counts registers and spills of every configuration, and fails on spills).
WEIGHT_REGISTERS = 128
# And, by tile, for two K chunks of h or dz on their way to shared memory.  Twice as many, and so half the chunks, were
# tried: equal on average, 8 % slower at worst.
TILE_REGISTERS = {8: 32, 16: 32}
SUM_REGISTERS = 160  # for weights and the sums of a tile together: with more, most kernels spill (`make kernels`)
# Warps of a program of the split design, with 255 registers per thread.  Sixteen were tried: 2 to 30 % slower.
WARPS = 8
# Of the resident design, at most: (forward, backward).  Sixteen are 10 % faster in forward; in backward they were
# 40 % slower, and spilled, as both do in strict float32.
RESIDENT_WARPS = {"16": (16, 8), "tf32": (16, 8), "float32": (8, 8)}
# The split design asks memory for gates so many steps ahead where a program has one tile and weights are not streamed,
# from H 512 on: there it was from 2 % slower to 17 % faster (H200, B 16 and 64), 9 % on average; with more tiles from
# 17 % slower to 18 % faster, at H 256 7 to 17 % slower.
AHEAD = 3
# The wide design: units of a program, whose gates are the 128 rows of weights that a product of two groups of four
# warps needs; parts of the terms in backward; registers of a thread for weights.
WIDE_UNITS, WIDE_PARTS, WIDE_REGISTERS = 32, 4, 96
# It has to be predicted so much faster to be taken: forward of 64 rows of H 1024, 1.14 times as fast by the model, took
# 6 % longer than by a split design, and that of 64 rows of H 768, 1.18 times, 12 % less.
WIDE_MARGIN = 1.15
# Bytes of shared memory that a program may use where no device says it, as under Triton's interpreter: what the large
# GPUs have at least (CUDA's programming guide: 8.0 163 KiB, 9.0 and 10.0 227).
SHARED = 160 * 1024

# Microseconds of what a step of the split design is made of, each with what it is counted in.  All of them together are
# a least-squares fit to the measured steps (see above); `python -m bench designs` prints the fit to what it measures.
COSTS = {
    "latency": 0.55,  # of any step: a product, the sum over warps, the cell
    "handoff": 0.14,  # for each doubling of the programs that exchange h or dz
    "pass": 0.37,  # for each further tile of rows of the same program
    "chunk": 0.02,  # for each further K chunk: polling for its data, and barriers
    "stream_chunk": 0.17,  # for a K chunk of streamed weights, per eight rows of a tile
    "read": 1 / 59.0,  # for a kilobyte of h or dz that a program reads from the second-level cache
    "stream": 1 / 41.0,  # and of weights
    "shared": 1 / 134.0,  # for a kilobyte through an SM's shared memory
    # A step of the resident design, which has no hand-off: measured at H 128, B 16; once for each program of an SM.
    "resident_forward": 0.97,
    "resident_backward": 1.35,
    # The wide design: of any step, with one or two hand-offs; for each further tile; for a kilobyte of h, dz and sums.
    "wide_forward": 2.77,
    "wide_backward": 3.07,
    "wide_pass": 2.38,
    "wide_read": 1 / 22.0,
}


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """ "16", "tf32" or "float32": what the tensor cores multiply."""
    return "16" if dtype.itemsize == 2 else "tf32" if tf32 else "float32"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Design:
    """One launch: which kernel, and its tile sizes."""

    kind: str  # "resident", "split" or "wide"
    units: int  # U
    tile: int  # BT, rows of a tile in registers
    rows: int  # rows of a tile that belong to the batch
    groups: int  # groups of rows; each has programs of its own
    tiles: int  # tiles of rows of a group, one after another
    slices: int  # slices of units; the programs of a group
    directions: int
    warps: int  # KW
    chunk: int = 0  # K, terms of a row of h or dz that are received together
    chunks: int = 0  # NK
    stream: bool = False  # weights do not fit the registers and are read in every step
    ahead: int = 0  # AHEAD, steps by which a split design asks memory for gates; 0: it does not
    held: int = 0  # HELD, K chunks of weights that a wide design has in registers, the others in shared memory
    parts: int = 1  # PARTS, of the terms of backward, for each of which a wide design has a sum
    step_time: float = 0.0  # predicted, microseconds

    @property
    def programs(self) -> int:
        return self.directions * self.groups * self.slices

    def __str__(self) -> str:
        if self.kind == "resident":
            return f"resident, {self.programs} programs of {self.tile} rows x {self.units} units, {self.warps} warps"
        sizes = f"{self.slices} slices of {self.units} units x {self.groups} groups of {self.tiles * self.rows} rows"
        how = ", weights streamed" if self.stream else f", sums of {self.parts} parts" if self.parts > 1 else ""
        return f"{self.kind}, {self.programs} programs: {sizes}{how}"


def cover(terms: int, least: int, most: int) -> tuple[int, int]:
    """(K, NK): NK chunks of K terms, a power of two, that cover ``terms`` with little waste.

    Chunks have ``most`` terms unless shorter ones reduce the total by a tenth.
    """
    size = max(least, min(power_of_two(terms), most))
    best = size
    while size > least:
        size //= 2
        if size * ceil_div(terms, size) < 0.9 * best * ceil_div(terms, best):
            best = size
    return best, ceil_div(terms, best)


def resident_design(
    hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, shared: int
) -> Design | None:
    """A program for each tile of rows, or None if one cannot hold the weights."""
    units = max(power_of_two(hidden), 16)
    warps = min(RESIDENT_WARPS[precision][backward], units // 4)
    if 4 * units * units * WEIGHT[precision] > WEIGHT_REGISTERS * 4 * 32 * min(WARPS, warps):
        return None
    if 4 * units * units * STATE[precision] + 4096 > shared:  # weights are loaded into registers through it
        return None
    tile = 8 if directions * ceil_div(batch, 8) <= sms else 16
    groups = ceil_div(batch, tile)
    design = Design("resident", units, tile, tile, groups, 1, 1, directions, warps)
    return replace(design, step_time=time_of(terms_of(design, hidden, backward, precision, sms)))


def split_terms(
    terms: int, tile: int, rows: int, tiles: int, m: int, slices: int, chunks: int, stream: bool, precision: str
) -> dict[str, float]:
    """How many of each of COSTS a step is made of: ``m`` rows of weights times ``tiles`` tiles of ``tile`` rows."""
    read = rows * terms * STATE[precision] / 1000  # kilobytes that a program receives per tile
    staged = terms * tile * STATE[precision] / 1000
    summed = WARPS * m * tile * 4 / 1000
    parts = {"latency": 1.0, "handoff": math.log2(slices), "pass": tiles - 1.0, "chunk": tiles * (chunks - 1.0)}
    parts |= {"read": tiles * read, "shared": tiles * 2 * (staged + summed)}
    if stream:
        parts["stream"] = tiles * m * terms * STATE[precision] / 1000
        parts["stream_chunk"] = tiles * chunks * tile / 8
    return parts


def wide_terms(design: Design, hidden: int, backward: bool) -> dict[str, float]:
    """As :func:`split_terms`, for a wide design."""
    rows = design.rows * design.tiles
    terms = design.chunk * design.chunks if backward else hidden
    read = rows * (2 * terms + (4 * design.parts * design.units if backward else 0)) / 1000
    name = "wide_backward" if backward else "wide_forward"
    return {name: 1.0, "wide_pass": design.tiles - 1.0, "wide_read": read}


def time_of(parts: Mapping[str, float], costs: Mapping[str, float] = COSTS) -> float:
    """Predicted microseconds of a step that is made of these."""
    return sum(count * costs[name] for name, count in parts.items())


def terms_of(design: Design, hidden: int, backward: bool, precision: str, sms: int) -> dict[str, float]:
    """What a step of a design is made of: how often each of COSTS."""
    if design.kind == "resident":
        return {f"resident_{'backward' if backward else 'forward'}": float(ceil_div(design.programs, sms))}
    if design.kind == "wide":
        return wide_terms(design, hidden, backward)
    terms, m = (4 * hidden, design.units) if backward else (hidden, 4 * design.units)
    sizes = (design.tile, design.rows, design.tiles, m, design.slices, design.chunks, design.stream)
    return split_terms(terms, *sizes, precision)


def _tiles(terms: int, m: int, tile: int, precision: str, shared: int, narrower: bool) -> tuple[int, int, bool] | None:
    """(K, NK, whether weights are streamed) of a program that multiplies ``m`` rows of weights by ``tile`` columns.

    None if it would spill; ``narrower``: the device has enough SMs for slices of fewer units.
    """
    # a K chunk on its way takes registers, and the next one as many
    longest = TILE_REGISTERS[tile] * 4 * 32 * WARPS // (2 * tile * WEIGHT[precision])
    chunk, chunks = cover(terms, DEPTH[precision] * WARPS, longest)
    weights = ceil_div(m * chunk * chunks * WEIGHT[precision], 4 * 32 * WARPS)  # registers of a thread
    fits = weights <= WEIGHT_REGISTERS and weights + m * tile // 32 <= SUM_REGISTERS
    if precision == "tf32" and tile > 8:
        fits = fits and weights < WEIGHT_REGISTERS  # these spill a little
    staged = chunk * tile * STATE[precision] + WARPS * m * tile * 4
    if fits and m * chunk * chunks * STATE[precision] + staged <= shared:
        return chunk, chunks, False
    # weights of two K chunks in registers, the current and the next, in addition to the sums
    if m > 64 and narrower:
        return None  # these spill: only if there are too few SMs for narrower slices
    sums = m * tile // 32 * (2 if precision == "float32" else 1)
    if tile > 8 and sums > SUM_REGISTERS - WEIGHT_REGISTERS:
        return None
    held = 4 if precision == "16" else 8 if tile == 8 else 16
    longest = min(longest, WEIGHT_REGISTERS * 4 * 32 * WARPS // (held * m * WEIGHT[precision]))
    chunk = max(DEPTH[precision] * WARPS, min(longest, power_of_two(terms)))
    return chunk, ceil_div(terms, chunk), True


def split_designs(
    hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, shared: int
) -> Iterator[Design]:
    """All split designs that fit the device, with their predicted times."""
    terms = 4 * hidden if backward else hidden
    narrower = directions * ceil_div(hidden, 16) <= sms
    for units, tile in product((16, 32) if backward else (8, 16, 32), TILE_REGISTERS):
        slices = ceil_div(hidden, units)
        m = units if backward else 4 * units
        if (k_tiles := _tiles(terms, m, tile, precision, shared, narrower)) is None:
            continue
        for groups in range(1, min(sms // (directions * slices), ceil_div(batch, 8)) + 1):
            rows = ceil_div(batch, groups)
            tiles = ceil_div(rows, tile)
            rows = ceil_div(rows, tiles)
            if tile > 8 and rows <= tile // 2:
                continue
            chunk, chunks, stream = k_tiles
            parts = split_terms(terms, tile, rows, tiles, m, slices, chunks, stream, precision)
            sizes = (units, tile, rows, groups, tiles, slices, directions, WARPS)
            ahead = AHEAD if precision == "16" and tiles == 1 and hidden >= 512 and not stream else 0
            yield Design("split", *sizes, chunk, chunks, stream, ahead, step_time=time_of(parts))


def wide_design(hidden: int, backward: bool, tile: int, shared: int) -> Design | None:
    """A program of the wide design for tiles of so many rows, of one group and tile; None if it does not fit."""
    parts = WIDE_PARTS if backward else 1
    of_part = ceil_div(ceil_div(hidden, parts), 64) * 64  # units
    slices = ceil_div(hidden, WIDE_UNITS * parts) * parts
    room = shared - 128 * tile * 4  # beside the tile's sums, which go to the threads of their cells in float32
    for chunk in (128, 64) if of_part % 128 == 0 else (64,):
        chunks = (4 if backward else 1) * of_part // chunk
        held = max(0, chunks - room // (128 * chunk * 2))  # 128 rows of weights
        if chunk == 64 or backward or tile < 64 or held == 0:
            break  # those that are left spill a little with chunks of 128
    if hidden % 8 or hidden < 256 or 128 * chunk * held * 2 > 4 * WIDE_REGISTERS * 32 * WARPS:
        return None
    sizes = (WIDE_UNITS, tile, tile, 1, 1, slices, 1, WARPS, chunk, chunks)
    return Design("wide", *sizes, held=held, parts=parts)


def wide_designs(
    hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, shared: int
) -> Iterator[Design]:
    """All wide designs that fit the device, with their predicted times."""
    if precision != "16":
        return
    for tile in (16, 32, 64):
        if (one := wide_design(hidden, backward, tile, shared)) is None:
            continue
        for groups in range(1, min(sms // (directions * one.slices), ceil_div(batch, 8)) + 1):
            rows = ceil_div(batch, groups)
            tiles = ceil_div(rows, tile)
            rows = ceil_div(rows, tiles)
            if rows > tile // 2:
                design = replace(one, rows=rows, groups=groups, tiles=tiles, directions=directions)
                yield replace(design, step_time=time_of(wide_terms(design, hidden, backward)))


@functools.lru_cache(maxsize=4096)
def choose_design(
    hidden: int,
    batch: int,
    directions: int,
    precision: str,
    sms: int,
    backward: bool,
    *,
    shared: int,
    wgmma: bool = False,
    kind: str | None = None,
) -> Design:
    """The design for one layer on a device with ``sms`` SMs and ``shared`` bytes of shared memory; ``kind`` forces one.

    ``wgmma``: the device multiplies from shared memory, as Hopper does and as the wide design needs.

    Raises ValueError if none fits (more slices than SMs at the widest tile: H above 32 x SMs / D).
    """
    if kind in (None, "resident"):
        resident = resident_design(hidden, batch, directions, precision, sms, backward, shared)
        if resident is not None:
            return resident
        if kind == "resident":
            raise ValueError(f"hidden size {hidden} does not fit one CTA in precision {precision}")
    designs = every_design(hidden, batch, directions, precision, sms, backward, shared, wgmma)
    if kind is not None:
        designs = (each for each in designs if each.kind == kind)
    margins = {"wide": WIDE_MARGIN}
    chosen = min(designs, key=lambda each: (each.step_time * margins.get(each.kind, 1.0), each.programs), default=None)
    if chosen is None:
        raise ValueError(
            f"hidden size {hidden} in {directions} directions needs {directions * ceil_div(hidden, 32)} SMs at least; "
            f"the device has {sms}, with {shared} bytes of shared memory for a program"
        )
    return chosen


def every_design(
    hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, shared: int, wgmma: bool
) -> Iterator[Design]:
    """All designs of all kinds that fit the device."""
    sizes = (hidden, batch, directions, precision, sms, backward, shared)
    resident = resident_design(*sizes)
    yield from () if resident is None else (resident,)
    yield from split_designs(*sizes)
    yield from wide_designs(*sizes) if wgmma else ()


def predict(hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, **limits: Any) -> float:
    """Predicted microseconds of a step of the recurrence; arguments as those of :func:`choose_design`."""
    return choose_design(hidden, batch, directions, precision, sms, backward, **limits).step_time
