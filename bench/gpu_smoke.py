"""``python -m bench.gpu_smoke``: each GPU design once, forward and backward, as small as it gets.

Compared with torch's LSTM, in seconds: the first thing to see on a GPU.  ``--unchecked`` leaves that away, for a
checker of memory accesses, under which a kernel takes a hundred times as long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.cases import MODES, Case
from bench.providers import OURS, PEER, algorithm, build, draw, precision
from bench.run import NO_GPU, NOTHING
from bench.table import KEY_FIGURES
from bench.verify import Mismatch, check

# Sizes that no tile divides, so that every mask is used: one block of threads holds all of R, then several share it.
CASES = (
    Case("smoke-h40", "smoke", 24, 40, 5, 6, dtype="bfloat16", device="cuda"),
    Case("smoke-h72-bidirectional", "smoke", 16, 72, 19, 4, dtype="float16", device="cuda", bidirectional=True),
    Case("smoke-h100-packed", "smoke", 16, 100, 6, 5, dtype="float32", device="cuda", mean_length=0.5),
    Case("smoke-h320", "smoke", 32, 320, 5, 4, dtype="bfloat16", device="cuda"),
    Case("smoke-h264-packed", "smoke", 16, 264, 18, 4, dtype="float16", device="cuda", mean_length=0.5),
    Case("smoke-h288-strict", "smoke", 16, 288, 3, 3, dtype="float32", device="cuda", strict=True),
)


def smoke(case: Case, checked: bool) -> str:
    """What came of a case, in words; RuntimeError where the kernels cannot run it, Mismatch for a wrong result."""
    with precision(case):
        runs = algorithm(OURS, case, "training", "triton")
        problem = draw(case)
        ours = build(OURS, problem, "triton")
        if checked:
            verdicts = check(problem, ours, build(PEER, problem), MODES)
            return f"largest error {max(verdict.error for verdict in verdicts.values()):.1e}, {runs}"
        ours.inference()
        ours.training()
        torch.cuda.synchronize()
        return f"ran, {runs}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--unchecked", action="store_true", help="run, and compare nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    ran = wrong = 0
    for case in CASES:
        try:
            said = smoke(case, not options.unchecked)
            ran += 1
        except Mismatch as mismatch:
            said = f"wrong result: {mismatch}"
            wrong += 1
        except RuntimeError as error:  # a named backend that cannot run a case says why
            said = f"not run: {error}"
        print(f"{case.name}: {said}", flush=True)
    print(f"{KEY_FIGURES}{ran} of {len(CASES)} small cases {'ran' if options.unchecked else 'are right'}")
    return 1 if wrong else 0 if ran else NOTHING


if __name__ == "__main__":
    sys.exit(main())
