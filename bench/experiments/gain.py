"""What bfloat16 gains: ours in bfloat16 beside ours in float32 of the same shape, behind an operation of torch's.

Both are checked first, each against its own oracle: the two have the same inputs and weights, but for their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench import tables
from bench.cases import Case
from bench.measure import Experiment, Task, backends, beside_torch, checked, timed
from bench.providers import OURS
from bench.rows import Row
from bench.timing import Effort, operation

BACKEND = "numba"  # by name: in bfloat16 "auto" may leave the call to torch
IN_FLOAT32 = f"{OURS} float32"


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a mode; none of a case in another dtype."""
    if case.dtype != "bfloat16":
        return
    modes, wide = task.modes(case), replace(case, dtype="float32")
    both, peer = checked(case, modes, task.backend), checked(wide, modes, task.backend).ours
    for mode in modes:
        samples = timed(case, getattr(both.ours, mode), getattr(peer, mode), task.effort, operation)
        row = beside_torch("bfloat16-gain", case, mode, samples, both, task)
        yield replace(row, peer=IN_FLOAT32, peer_backend=backends(wide, mode, task.backend)["backend"])


GAIN = Experiment(
    name="bfloat16-gain",
    what="ours in bfloat16 beside ours in float32 of the same shape, behind an operation of torch's",
    times="a call in bfloat16",
    measure=measure,
    full={"cpu": Effort(7, 6.0)},
    quick={"cpu": Effort(5, 1.5)},
    backend={"cpu": BACKEND},
    show=tables.show_promised,
)
