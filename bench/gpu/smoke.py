"""Each GPU design once, forward and backward, as small as it gets.

Compared with torch's LSTM, in seconds: the first thing to see on a GPU.  Unchecked for a checker of memory accesses,
under which a kernel takes a hundred times as long.
"""

from __future__ import annotations

import torch

from bench.cases import MODES, Case, select
from bench.measure import NOTHING
from bench.providers import OURS, PEER, algorithm, build, draw, precision
from bench.tables import KEY_FIGURES
from bench.verify import Mismatch, check

BACKEND = "triton"
SEGMENTED = ("smoke-h72-bidirectional", "smoke-h100-packed")  # run by segments too, of so many steps:
SEGMENT = 2


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
                torch.cuda.synchronize()
        return f"largest error {max(errors):.1e}, {runs}" if checked else f"ran, {runs}"


def run(unchecked: bool) -> int:
    """``python -m bench smoke``."""
    ran = wrong = 0
    cases = select("smoke", "cuda")
    for case in cases:
        try:
            said = smoke(case, not unchecked)
            ran += 1
        except Mismatch as mismatch:
            said = f"wrong result: {mismatch}"
            wrong += 1
        except RuntimeError as error:  # a named backend that cannot run a case says why
            said = f"not run: {error}"
        print(f"{case.name}: {said}", flush=True)
    print(f"{KEY_FIGURES}{ran} of {len(cases)} small cases {'ran' if unchecked else 'are right'}")
    return 1 if wrong else 0 if ran else NOTHING
