"""What the plan's model predicts of more threads: a table, and nothing is measured.

The model's rates are measured with two threads at most; what waiting costs among more of them is a guess.  What was
measured with up to 16 stands beside the table in docs/notes/cpu-tuning.md.
"""

from __future__ import annotations

import torch
from lstmcore.kernels.cpu import caches, tiling
from lstmcore.kernels.integers import ceil_div

THREADS = (1, 2, 4, 8, 16, 32)
SHAPES = ((32, 64), (32, 128), (64, 128), (32, 256), (8, 512), (32, 1024))  # B, H = I
CORES = {"AVX2, 512 KiB": ("avx2", "AuthenticAMD", 512 << 10), "AVX-512, 2 MiB": ("avx512", "GenuineIntel", 2 << 20)}


def predicted(batch: int, hidden: int, threads: int, isa: str, core: tiling.Core, backward: bool) -> float:
    """Modelled nanoseconds of a step of float32, one layer and direction."""
    block, sizes = tiling.block_shape(isa, torch.float32), (hidden, hidden, hidden)
    parts = tiling.parts(batch, *sizes, block, 4, 1) if backward else 1
    plan = tiling.plan(1000, batch // parts, *sizes, block, 4, max(1, threads // parts), backward, core)
    shared = (plan.row_groups, plan.unit_groups)
    one = tiling.shared_step_time(batch // parts, *sizes, *shared, block, 4, core)
    at_once = min(parts, max(1, threads // plan.members))
    return one * ceil_div(parts, at_once)


def table(isa: str, core: tiling.Core) -> str:
    lines = ["| pass | B | H | " + " | ".join(map(str, THREADS)) + " |", "|---" * (3 + len(THREADS)) + "|"]
    for name, backward in (("forward", False), ("backward", True)):
        for batch, hidden in SHAPES:
            times = [predicted(batch, hidden, threads, isa, core, backward) for threads in THREADS]
            cells = " | ".join(f"{times[0] / time:.1f}" for time in times)
            lines.append(f"| {name} | {batch} | {hidden} | {cells} |")
    return "\n".join(lines)


def run() -> int:
    """``python -m bench scaling``."""
    for title, (isa, vendor, size) in CORES.items():
        print(f"{title} of second-level cache: times as fast as one thread, predicted\n")
        print(table(isa, tiling.core_of(isa, caches.Caches(size, vendor))), "\n")
    return 0
