"""The GPU kernels of the quick benchmark, compiled by all processors at once.

Triton keeps what it has compiled on disk, where the process that measures finds it.  One after the other, in that
process, the quick cases compile for four minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context

import torch

from bench.cases import select
from bench.providers import OURS, build, draw, precision

WORKERS = 12
MOST_S = 60.0  # for the kernels of an experiment, by all processes; never more than half of the time for it
STEPS = 3  # of the calls that make the compiler run


def spread(share: Callable[[int, int], None], limit_s: float) -> str:
    """Runs ``share(I, N)`` in N processes, with I from 0 on; says how it went.

    What is not ready in time is compiled when it is wanted.
    """
    started = time.monotonic()
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
    # Fresh processes: CUDA does not work in forked ones.
    processes = [get_context("spawn").Process(target=share, args=(i, workers)) for i in range(workers)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.1, started + limit_s - time.monotonic()))
        late = sum(process.is_alive() for process in processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    seconds = time.monotonic() - started
    return f"compiled by {workers} processes in {seconds:.0f} s" + (f"; {late} were not done" if late else "")


def quick_share(worker: int, workers: int) -> None:
    """Every ``workers``-th of the quick cases, for a few steps."""
    for each in select(device="cuda", quick=True)[worker::workers]:
        case = replace(each, steps=STEPS)
        with precision(case):
            runner = build(OURS, draw(case), "triton")
            runner.inference()
            runner.training()
    torch.cuda.synchronize()


def run(limit_s: float) -> int:
    """``python -m bench compile``."""
    print(spread(quick_share, limit_s))
    return 0
