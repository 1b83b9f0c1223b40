"""``python -m bench.gpu_smoke``: each GPU design once, forward and backward, as small as it gets.

For a checker of memory accesses, under which a kernel takes a hundred times as long; that results are right is what the
tests and the benchmark check.
"""

from __future__ import annotations

import sys

import torch

from bench.cases import Case
from bench.providers import OURS, algorithm, build, draw, precision
from bench.run import NO_GPU, NOTHING
from bench.table import KEY_FIGURES

# Sizes that no tile divides, so that every mask is used: one block of threads holds all of R, then several share it.
CASES = (
    Case("smoke-h40", "smoke", 24, 40, 5, 6, dtype="bfloat16", device="cuda"),
    Case("smoke-h72-bidirectional", "smoke", 16, 72, 19, 4, dtype="float16", device="cuda", bidirectional=True),
    Case("smoke-h100-packed", "smoke", 16, 100, 6, 5, dtype="float32", device="cuda", mean_length=0.5),
    Case("smoke-h320", "smoke", 32, 320, 5, 4, dtype="bfloat16", device="cuda"),
    Case("smoke-h264-packed", "smoke", 16, 264, 18, 4, dtype="float16", device="cuda", mean_length=0.5),
    Case("smoke-h288-strict", "smoke", 16, 288, 3, 3, dtype="float32", device="cuda", strict=True),
)


def main() -> int:
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    ran = []
    for case in CASES:
        with precision(case):
            try:
                runs = algorithm(OURS, case, "training", "triton")
            except RuntimeError as error:  # a named backend that cannot run a case says why
                print(f"{case.name}: not run: {error}")
                continue
            runner = build(OURS, draw(case), "triton")
            runner.inference()
            runner.training()
            torch.cuda.synchronize()
        ran.append(case.name)
        print(f"{case.name}: ran, {runs}", flush=True)
    print(f"{KEY_FIGURES}{len(ran)} of {len(CASES)} small cases ran")
    return 0 if ran else NOTHING


if __name__ == "__main__":
    sys.exit(main())
