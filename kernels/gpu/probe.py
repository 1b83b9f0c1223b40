"""The hand-off of ``split.py`` alone: programs that only exchange rows.

The model of a step (``tiling.py``) uses its cost by number of programs and size of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import receive, start_votes


@triton.jit(do_not_specialize=["steps", "patience"])
def handoff_kernel(
    y,  # (steps, ROWS, WORDS) int32, filled with -1
    status,  # (1,) int32: set to 1 when a wait gave up
    steps,
    patience,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,  # of a row
    WIDTH: tl.constexpr,  # the smallest power of two that is at least WORDS
    SLICE: tl.constexpr,  # words of a row that one program writes
):
    """Each program writes its slice of a row: one more than the largest word of the row before."""
    patience = start_votes(patience)
    i_row = tl.arange(0, ROWS)[:, None]
    o_word = tl.arange(0, WIDTH)[None, :]
    o_slice = tl.program_id(0) * SLICE + tl.arange(0, SLICE)[None, :]
    tl.store(y + i_row * WORDS + o_slice, tl.zeros((ROWS, SLICE), tl.int32))
    i = 1
    while i < steps:
        before = y + tl.cast(i - 1, tl.int64) * ROWS * WORDS
        p = before + i_row * WORDS + o_word
        everywhere = (i_row < ROWS) & (o_word < WORDS)
        words, missing = receive(tl.load(p, mask=everywhere, other=0, volatile=True), p, everywhere, patience, 1)
        if missing > 0:
            tl.store(status, 1)
            patience = 0
        value = tl.max(words, axis=None) + 1
        tl.store(before + ROWS * WORDS + i_row * WORDS + o_slice, tl.zeros((ROWS, SLICE), tl.int32) + value)
        i += 1


def handoff_latency(ctas: int, rows: int, width: int, dtype: torch.dtype, steps: int) -> float:
    """Microseconds of one hand-off of ``rows`` rows among ``ctas`` programs on the current CUDA device.

    Each program writes ``width`` entries of ``dtype`` of every row and reads all ``ctas * width``.  ``rows`` is
    rounded up to a power of two.

    Raises RuntimeError if a program gave up waiting, or if a value is not what the hand-offs should have produced.
    """
    rows = triton.next_power_of_2(rows)
    words = max(1, width * dtype.itemsize // 4)
    y = torch.empty(steps, rows, ctas * words, dtype=torch.int32, device="cuda")
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(4):  # the first compiles
        y.fill_(-1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        handoff_kernel[(ctas,)](
            y, status, steps, 4_000_000, rows, ctas * words, triton.next_power_of_2(ctas * words), words,
            num_warps=8, launch_cooperative_grid=True, enable_fp_fusion=True,
        )  # fmt: skip
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / steps)
    if status.item() or not torch.equal(y[:, 0, 0].cpu(), torch.arange(steps, dtype=torch.int32)):
        raise RuntimeError(f"{ctas} programs did not pass {rows} rows on as they should have: they gave up waiting")
    return min(times[1:])
