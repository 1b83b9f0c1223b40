"""The GPU kernels of the quick benchmark, compiled by all processors at once.

Triton keeps what it has compiled on disk, where the process that measures finds it.  One after the other, in that
process, the quick cases compile for four minutes.
"""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import time
from dataclasses import replace

import torch

from bench.cases import select
from bench.providers import OURS, build, draw, precision

WORKERS = 12
STEPS = 3  # of the calls that make the compiler run


def spread(share: str, limit_s: float) -> str:
    """Runs ``share(I, N)``, a function named "module:name", in N processes with I from 0 on; says how it went.

    What is not ready in time is compiled when it is wanted.
    """
    started = time.monotonic()
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
    commands = [[sys.executable, "-m", "bench.gpu.compile", share, str(i), str(workers)] for i in range(workers)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    late = 0
    try:
        for process in processes:
            try:
                process.wait(max(0.1, started + limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                late += 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
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


def quick(limit_s: float) -> int:
    """``python -m bench compile``."""
    print(spread("bench.gpu.compile:quick_share", limit_s))
    return 0


if __name__ == "__main__":
    pkgutil.resolve_name(sys.argv[1])(*map(int, sys.argv[2:]))
