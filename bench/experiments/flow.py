"""What recording the gradient flow costs: training steps with and without it, by turns in one process.

A recorded step is timed with everything that a training waits for: entering and leaving the context, the kernel's
norms, the statistics of the gates.  Means and quantiles are worked out when somebody reads the records, which is timed
apart.  Before a case is timed, its outputs and gradients are checked against torch, and found to be the same bits with
the recording as without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

import lstmcore
from bench import costs, tables
from bench.cases import Case
from bench.measure import Experiment, Task, checked, quantiles, ratio_columns, row_of, timed
from bench.providers import Runner
from bench.rows import COST, Row
from bench.timing import Effort, Samples
from bench.verify import Mismatch

LIMIT = 1.05  # times a training step without: what the project promises
EVERY = (1, 10)  # so many steps, of which the first is recorded


def recorded(runner: Runner, every: int) -> Callable[[], None]:
    """``every`` training steps, the first of them recorded."""

    def steps() -> None:
        with lstmcore.record_gradient_flow(runner.module, every) as flow:
            for _ in range(every):
                runner.training()
        assert flow.passes == every

    return steps


def reading(runner: Runner) -> float:
    """Milliseconds that it takes to read a recorded step, the least of several."""
    seconds = []
    for _ in range(5):
        with lstmcore.record_gradient_flow(runner.module) as flow:
            runner.training()
        start = time.perf_counter()
        assert flow.records
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3


def plain(runner: Runner, every: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(every):
            runner.training()

    return steps


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row for each ``EVERY``, as long as the one before is not cheap enough.

    Raises Mismatch where results are wrong, or not the same with the recording.
    """
    if "training" not in task.modes(case):
        return
    ours = checked(case, ("training",), task.backend).ours
    alone = ours.training()
    with lstmcore.record_gradient_flow(ours.module):
        watched = ours.training()
    if not all(map(torch.equal, alone, watched)):
        raise Mismatch(f"{case.name}: expected the same bits with and without a recording, they differ")
    for every in EVERY:
        samples = timed(case, recorded(ours, every), plain(ours, every), task.effort)
        on, off = (tuple(seconds / every for seconds in side) for side in (samples.ours, samples.peer))
        row = row_of(
            "flow",
            case,
            "training",
            variant=f"every {every}",
            backend=task.backend,
            peer="lstmcore unrecorded",
            pairs=len(on),
            **quantiles(on),
            **quantiles(off, "peer_"),
            **ratio_columns(Samples(on, off), COST),
            limit=LIMIT,
            details={"reading_ms": f"{reading(ours):.6g}"},
        )
        yield row
        if not row.broken:
            break  # cheap enough at every step


FULL = Effort(15, 5.0)
FLOW = Experiment(
    name="flow",
    what="what recording the gradient flow adds to a training step",
    times="a training step",
    measure=measure,
    full={"cpu": FULL, "cuda": FULL},
    quick={"cpu": Effort(5, 1.0), "cuda": Effort(15, 1.0)},
    backend={"cpu": "numba", "cuda": "triton"},
    details={"reading_ms": "to read what was recorded of a step, the least of several"},
    seconds=costs.predicted_s,
    show=tables.show_promised,
)
