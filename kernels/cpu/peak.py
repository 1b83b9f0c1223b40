"""The peak multiplication rate of this machine, which the benchmark's shares of the peak refer to.

A block of the kernels' own shape runs over operands that stay in the first-level cache, on as many threads at once as
requested; the best of several runs counts.  Nothing in the library runs faster, so no share is too high.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from . import threads
from .jit import kernel
from .memory import make_read
from .microkernel import Around, make_block
from .problem import kernels_of
from .tiles import tile_state
from .variant import Variant

DEPTH = 96  # terms: 24 KiB of weights, 2.3 KiB of rows; 6 KiB where a block has 16
# Products over the same operands that a block adds up, so that writing the sums hardly counts: with one, AMX reaches
# 2000 GF/s, with 4 2300 to 2450, with 16 2500 to 2600 (a core of a Xeon, Emerald Rapids; 1024 are done in a cycle).
SUMS = 16
SECONDS = 0.05  # of one run


class PeakArgs(NamedTuple):
    """Arguments of a thread (see ``arguments.py``)."""

    out: int  # (rows, panel)
    a: int  # (rows, depth)
    offsets: int  # (rows,) int64
    w: int  # (depth, panel)
    depth: int
    repeats: int


class PeakEnd(NamedTuple):
    out: int


@functools.cache
def _peak_kernel(variant: Variant) -> Any:
    store_vectors, gate_bytes = variant.ops.store_vectors, variant.gate_bytes
    rows, panel = variant.block.rows, variant.block.panel
    shape_tiles, release_tiles = tile_state(variant)
    read = make_read(PeakArgs)

    def finish_peak(row, sums, e):
        store_vectors(e.out + row * gate_bytes, sums, panel)

    full_block = make_block(variant, 4, Around(finish_peak), rows=[rows])

    @kernel(variant.key)
    def peak_kernel(address):
        p = read(address)
        one = (p.a, p.offsets, 1, 0, p.depth, p.w, p.w)
        four = one + one + one + one  # Numba has no 16 * one
        shape_tiles(rows)
        for _ in range(p.repeats):
            full_block(rows, four + four + four + four, PeakEnd(p.out))
        release_tiles()

    return peak_kernel


def peak(dtype: torch.dtype, threads_wanted: int) -> float:
    """GF/s (1e9 multiplications and additions per second) of ``threads_wanted`` cores for tensors of ``dtype``.

    It is that of the instruction that multiplies them here (see ``products.py``): float16 is computed in float32, and
    so is bfloat16 where no instruction of its own is used.
    """
    variant = kernels_of(dtype).variant
    run_block, rows, panel = _peak_kernel(variant), variant.block.rows, variant.block.panel
    available = threads.available(threads_wanted)
    sizes = (rows * variant.gate_bytes, rows * DEPTH * variant.size, DEPTH * variant.gate_bytes + 4096)
    # Torch's memory is aligned: where rows of tiles cross cache lines, AMX reaches 880 GF/s, not 2500.
    arrays = [[torch.zeros(size, dtype=torch.uint8) for size in sizes] for _ in range(available)]
    offsets = np.arange(rows, dtype=np.int64) * (DEPTH * variant.size)

    def seconds(repeats: int) -> float:
        arguments = [
            PeakArgs(out.data_ptr(), a.data_ptr(), offsets.ctypes.data, w.data_ptr(), DEPTH, repeats)
            for out, a, w in arrays
        ]
        structs = np.array(arguments, np.int64)
        launch = threads.Launch(structs.ctypes.data, available, structs.strides[0])
        begin = time.perf_counter()
        threads.run(run_block, launch)
        return time.perf_counter() - begin

    repeats = max(1, int(100 * SECONDS / seconds(100)))
    best = min(seconds(repeats) for _ in range(9))
    return 2 * available * repeats * SUMS * rows * panel * DEPTH * variant.products.values / best / 1e9
