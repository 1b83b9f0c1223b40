"""``python -m bench.gpu_compile``: the GPU kernels of the quick benchmark, compiled by all processors at once.

Triton keeps what it has compiled on disk, where the process that measures finds it.  One after the other, in that
process, the quick cases compile for four minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.gpu_cases import GPU_CASES, QUICK
from bench.providers import OURS, build, draw, precision
from bench.run import NO_GPU

WORKERS = 12
STEPS = 3  # of the calls that make the compiler run


def spread(module: str, limit_s: float) -> str:
    """Runs ``python -m module --compile I N`` for each of N workers, and says how it went.

    What is not ready in time is compiled when it is wanted.
    """
    started = time.monotonic()
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
    commands = [[sys.executable, "-m", module, "--compile", str(i), str(workers)] for i in range(workers)]
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
    for name in QUICK[worker::workers]:
        case = replace(GPU_CASES[name], steps=STEPS)
        with precision(case):
            runner = build(OURS, draw(case), "triton")
            runner.inference()
            runner.training()
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_compile", description=__doc__.splitlines()[0])
    parser.add_argument("--limit-s", type=float, default=90.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("WORKER", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.compile:
        quick_share(*options.compile)
    else:
        print(spread("bench.gpu_compile", options.limit_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
