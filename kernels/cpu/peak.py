"""The peak multiplication rate of this machine, which the benchmark's shares of the peak refer to.

A block of the kernels' own shape runs over operands that stay in the first-level cache, on as many threads at once as
requested; the best of several runs counts.  Nothing in the library runs faster, so no share is too high.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import numpy as np
import torch

from ..contract import state_dtype
from . import threads, tiling
from .jit import kernel
from .memory import make_read
from .microkernel import make_block
from .simd import simd

DEPTH = 96  # 24 KiB of weights, 2.3 KiB of rows
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
def _peak_kernel(scalar: str, block: tiling.Block):
    ops = simd(scalar, block.lanes)
    zero_four, store_vectors, width = ops.zero_four, ops.store_vectors, 4 * block.lanes

    def start(row, e):
        return zero_four()

    def finish_peak(row, sums, e):
        store_vectors(e.out + row * width * ops_size, sums, width)

    ops_size, rows = ops.size, block.rows
    full_block = make_block(
        ops, (rows,), 4, start, finish_peak, key=f"{scalar}_{block.lanes}of{block.registers}", registers=block.registers
    )

    read = make_read(PeakArgs)

    @kernel(f"{scalar}{block}")
    def peak_kernel(address):
        p = read(address)
        for _ in range(p.repeats):
            full_block(rows, (p.a, p.offsets, 1, 0, p.depth, p.w, p.w), PeakEnd(p.out))

    return peak_kernel


def fma_peak(dtype: torch.dtype, threads_wanted: int) -> float:
    """GF/s (1e9 multiplications and additions per second) of ``threads_wanted`` cores for tensors of ``dtype``.

    bfloat16 and float16 compute in float32 (see ``contract.state_dtype``), so their peak is float32's.
    """
    compute = state_dtype(dtype)
    block = tiling.block_shape(tiling.cpu_isa(), compute)
    run_block = _peak_kernel(str(compute).removeprefix("torch."), block)
    available = threads.available(threads_wanted)
    arrays = [
        [np.zeros(n) for n in (block.rows * block.panel, block.rows * DEPTH, DEPTH * block.panel + 512)]
        for _ in range(available)
    ]
    offsets = np.arange(block.rows, dtype=np.int64) * (DEPTH * compute.itemsize)

    def seconds(repeats: int) -> float:
        arguments = [
            PeakArgs(out.ctypes.data, a.ctypes.data, offsets.ctypes.data, w.ctypes.data, DEPTH, repeats)
            for out, a, w in arrays
        ]
        structs = np.array(arguments, np.int64)
        launch = threads.Launch(structs.ctypes.data, available, structs.strides[0])
        begin = time.perf_counter()
        threads.run(run_block, launch)
        return time.perf_counter() - begin

    repeats = max(1, int(1000 * SECONDS / seconds(1000)))
    best = min(seconds(repeats) for _ in range(9))
    return 2 * available * repeats * block.rows * block.panel * DEPTH / best / 1e9
