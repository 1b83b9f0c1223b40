"""Each GPU design once, forward and backward, as small as it gets.

Compared with torch's LSTM, in seconds: the first thing to see on a GPU.  Each case runs in a process of its own, since
a kernel that breaks CUDA's context would take the others along; they run beside each other, so that all take as long as
the one that compiles longest.  Unchecked, and in one process, for a checker of memory accesses, under which a kernel
takes a hundred times as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from bench.cases import MODES, Case, select
from bench.gpu import launches
from bench.measure import NOTHING
from bench.providers import OURS, PEER, algorithm, build, draw, precision
from bench.session import REFUSED
from bench.tables import KEY_FIGURES
from bench.verify import Mismatch, check

BACKEND = "triton"
SEGMENTED = ("smoke-h72-bidirectional", "smoke-h100-packed")  # run by segments too, of so many steps:
SEGMENT = 2
DRY = ("smoke-h40", "smoke-h100-packed")  # of each kind of design what Triton's interpreter is done with soonest


def smoke(case: Case, checked: bool) -> str:
    """What came of a case, in words; RuntimeError where the kernels cannot run it, Mismatch for a wrong result."""
    with precision(case):
        runs = algorithm(OURS, case, "training", BACKEND)
        problem = draw(case)
        ours = build(OURS, problem, BACKEND)
        errors = []
        for segment in (None, SEGMENT) if case.name in SEGMENTED else (None,):
            ours.module.recompute = segment
            if checked:
                verdicts = check(problem, ours, build(PEER, problem), MODES)
                errors += [verdict.max_error for verdict in verdicts.values()]
            else:
                ours.inference()
                ours.training()
            if case.device == "cuda":
                launches.settle()
        return f"largest error {max(errors):.1e}, {runs}" if checked else f"ran, {runs}"


def here(cases: Sequence[Case], checked: bool) -> Iterator[tuple[int, str]]:
    """Of each case, in this process: an exit status, and a line."""
    for case in cases:
        try:
            status, said = 0, smoke(case, checked)
        except Mismatch as mismatch:
            status, said = 1, f"wrong result: {mismatch}"
        except RuntimeError as error:  # a named backend that cannot run a case says why
            status, said = (NOTHING, f"not run: {error}") if REFUSED in str(error) else (1, f"failed: {error}")
        yield status, f"{case.name}: {said}"


def _child(case: Case, limit_s: float, dry_run: bool) -> tuple[int, str]:
    """Of a case, in a process of its own: its exit status, and its line."""
    command = [sys.executable, "-u", "-m", "bench", "smoke", "--case", case.name, *(["--dry-run"] if dry_run else [])]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"{case.name}: failed: the {limit_s:.0f} seconds for it were over"
    own = [line for line in done.stdout.splitlines() if line.startswith(f"{case.name}: ")]
    if own:
        return done.returncode, own[-1]
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    return done.returncode or 1, f"{case.name}: failed: its process ended with status {done.returncode}: {last}"


def apart(cases: Sequence[Case], limit_s: float, dry_run: bool) -> Iterator[tuple[int, str]]:
    """Of each case, in a process of its own, beside the others as far as there are processors."""
    with ThreadPoolExecutor(max(1, min(len(cases), len(os.sched_getaffinity(0))))) as pool:
        yield from pool.map(partial(_child, limit_s=limit_s, dry_run=dry_run), cases)


def run(unchecked: bool = False, case: str | None = None, limit_s: float = 60.0, dry_run: bool = False) -> int:
    """``python -m bench smoke``: 1 if a case is wrong or failed, NOTHING if none could be run.

    ``case``: only those that match, in this process; ``dry_run``: on the CPU, by Triton's interpreter.
    """
    cases = select("smoke", "cuda", pattern=case)
    if not cases:
        print(f"no case matches {case}: expected one of {', '.join(each.name for each in select('smoke', 'cuda'))}")
        return 2
    if case is None and not unchecked:
        cases = [each for each in cases if not dry_run or each.name in DRY]
        found = apart(cases, limit_s, dry_run)
    else:
        if dry_run:
            os.environ["TRITON_INTERPRET"] = "1"
            cases = [replace(each, device="cpu") for each in cases]
        found = here(cases, not unchecked)
    statuses = []
    for status, line in found:
        statuses.append(status)
        print(line, flush=True)
    ran = statuses.count(0)
    print(f"{KEY_FIGURES}{ran} of {len(cases)} small cases {'ran' if unchecked else 'are right'}")
    return 1 if set(statuses) - {0, NOTHING} else 0 if ran else NOTHING
